"""Reproductions and studies, each runnable, each with its report."""
