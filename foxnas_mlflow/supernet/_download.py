"""Published weights by name, downloaded once.

The publishers' file names hold the first eight digits of the content's SHA-256, as PyTorch's hub checks
them; size and whole digest are recorded in the run.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.files import cache_directory, file_digest, write_atomically

_TIMM = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/"
_TORCHVISION = "https://download.pytorch.org/models/"

PUBLISHED: Mapping[str, str] = {
    "timm:mobilenetv3_large_100": f"{_TIMM}mobilenetv3_large_100_ra-f55367f5.pth",
    "timm:mobilenetv3_small_100": f"{_TIMM}mobilenetv3_small_100_lamb-266a294c.pth",
    "timm:efficientnet_lite0": f"{_TIMM}efficientnet_lite0_ra-37913777.pth",
    "timm:tf_efficientnet_lite0": f"{_TIMM}tf_efficientnet_lite0-0aa007d2.pth",
    "torchvision:mobilenet_v3_large": f"{_TORCHVISION}mobilenet_v3_large-5c1a4163.pth",
    "torchvision:mobilenet_v3_small": f"{_TORCHVISION}mobilenet_v3_small-047dcff4.pth",
}
"""Addresses by name; the digits before the suffix begin the content's SHA-256."""

_TIMEOUT_S = 60


def download(name: str, urls: Mapping[str, str] = PUBLISHED) -> Path:
    """The file of published weights, from the cache where it is there.

    Args:
        name: For example ``timm:mobilenetv3_large_100``.
        urls: Addresses by name.

    Raises:
        InvalidInputError: If the name is unknown, nothing can be downloaded, or the content is another one.
    """
    if name not in urls:
        raise InvalidInputError(f"init must be one of {sorted(urls)} or the path of a checkpoint", received=name)
    url = urls[name]
    path = cache_directory("weights") / url.rpartition("/")[2]
    if not path.is_file():
        write_atomically(path, _fetch(name, url))
    begins = path.stem.rpartition("-")[2]
    digest = file_digest(path)
    if not digest.startswith(begins):
        path.unlink()
        raise InvalidInputError(
            f"the SHA-256 of {name} must begin with {begins}", received=digest, remedy="try again, or give a path"
        )
    return path


def _fetch(name: str, url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:  # noqa: S310 - one of the addresses above
            content: bytes = response.read()
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        raise InvalidInputError(
            f"{name} must be downloadable from {url}",
            received=str(getattr(error, "reason", error)),
            remedy="download it elsewhere and give its path",
        ) from error
    return content
