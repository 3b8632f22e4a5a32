"""Banks on the Hugging Face Hub, or in another folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from steer.bank import folder
from steer.bank.bank import Bank
from steer.bank.upkeep import NoArtifact
from steer.errors import SteerError
from steer.files import draft_folder

_HUB = "hf://"
# Nothing else is uploaded, or taken from a stranger's repository.
_FILES = [folder.MANIFEST, folder.INDEX, f"{folder.SEGMENTS}/*.safetensors", f"{folder.ARTIFACTS}/*.safetensors"]


def push(
    bank: Bank, target: str | Path, *, private: bool = True, on_progress: Callable[[float], None] | None = None
) -> None:
    """Puts a packed copy of a bank into a repository of the Hub, or into a folder.

    The Hub keeps old versions of a repository: what is deleted from the bank later is erased there only with them.

    Args:
        bank: others may read and write it meanwhile.
        target: `hf://OWNER/NAME`, which is made if there is none; or a folder that does not exist yet.
        private: whether a new repository is private.
        on_progress: told what share of the states has been copied.

    Raises:
        SteerError: the folder exists, or the Hub refuses.
    """
    if not str(target).startswith(_HUB):
        bank.copy(target, on_progress=on_progress).close()
        return
    name = str(target).removeprefix(_HUB)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "bank"
        bank.copy(copy, on_progress=on_progress).close()
        try:
            hub = HfApi()
            hub.create_repo(name, private=private, exist_ok=True)
            hub.upload_folder(repo_id=name, folder_path=copy, allow_patterns=_FILES, delete_patterns=_FILES)
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise SteerError(f"{target}: the Hub did not take the bank ({error})") from error


def pull(source: str | Path, path: str | Path, *, on_progress: Callable[[float], None] | None = None) -> Bank:
    """Fetches a bank from the Hub or from a folder, and verifies every byte of it before it takes its place.

    Args:
        source: `hf://OWNER/NAME`, or a folder.
        path: where to put it; nothing may be there.
        on_progress: told what share has been verified.

    Raises:
        SteerError: there is something at `path`, the Hub does not have it, or it is no sound bank.
    """
    if not str(source).startswith(_HUB):
        # Not file by file: closing a copy of the index would take away the locks that this process has on it.
        with Bank(source, create=False) as bank:
            return bank.copy(path, on_progress=on_progress)
    with draft_folder(Path(path).resolve()) as draft:
        _fetch(str(source).removeprefix(_HUB), draft)
        with Bank(draft, create=False) as bank:
            # Which artifacts it ever had, a bank does not know.
            if faults := [fault for fault in bank.verify(on_progress) if not isinstance(fault, NoArtifact)]:
                first = str(faults[0]).replace(str(draft), str(source))
                raise SteerError(f"{source}: the bank is damaged ({first}); nothing was written")
    return Bank(path, create=False)


def _fetch(name: str, draft: Path) -> None:
    try:
        # A star stands for slashes too, and a bank has no folders in folders.
        snapshot_download(name, local_dir=draft, allow_patterns=_FILES, ignore_patterns="*/*/*")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SteerError(f"{_HUB}{name}: cannot be fetched from the Hub ({error})") from error
    # Where the Hub's client notes what it has fetched.
    shutil.rmtree(draft / ".cache", ignore_errors=True)
    for inside in (folder.SEGMENTS, folder.ARTIFACTS):
        (draft / inside).mkdir(parents=True, exist_ok=True)
