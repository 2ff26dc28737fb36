"""Models by their names on the Hugging Face hub, through its own library: the network is asked once, the cache kept."""

import os
import re
from pathlib import Path

from ringbpt.config.foreign import user_path
from ringbpt.config.values import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a model is and its tokenizer; and its weights.
SETTINGS, WEIGHTS = ("*.json", "*.jinja", "*.txt", "tokenizer.model"), ("model*.safetensors",)


def stop_asking_where_none_answers() -> bool:
    """Whether the hub answers; where it doesn't, its library takes what it has kept and makes no further attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # of whatever library the session is
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def model_folder(path: str, where: str, weights: bool = False, download: bool = True) -> Path:
    """The folder of a model by its path or, where there is none and it reads org/name, by its name on the hub.

    What is missing of the latter is downloaded into the hub's cache: what says what it is, and with `weights` all of
    it. A path that is neither comes back as it is. Raises UserError, with `where` as the culprit, where the hub has no
    such model or doesn't answer and the cache doesn't have it.
    """
    folder = user_path(path)
    if os.path.exists(folder) or not NAME.fullmatch(path):
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        if not download:
            return folder
        raise UserError(
            f"{where}: no such folder; for a model of the hub by its name: pip install 'ringbpt[hf]'"
        ) from None
    patterns = [*SETTINGS, *(WEIGHTS if weights else ())]
    near = download and stop_asking_where_none_answers()
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, local_files_only=not near))
    except GatedRepoError:
        raise UserError(f"{where}: accept its terms at https://huggingface.co/{path}, and `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where}: no such folder, and no such model on the hub; one of your own wants `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        if not download:
            return folder
        raise UserError(
            f"{where}: no such folder, and the hub doesn't answer (no network, or HF_HUB_OFFLINE), nor has its cache "
            "this model: give the path of a folder"
        ) from None
    except Exception as error:  # a name that cannot be one, a disk that is full
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None
