"""Signatures of logged models in the OpenSSF's format (model-signing), kept with the logged model.

The seal (`foxnas_mlflow.flavor._seal`) tells that files are as they were logged; a signature tells who vouches for
them. It covers every file of the model, and stands as a tag of the logged model, so that all versions of the model
have it: a tag can be removed or replaced by who may write to the registry, but not forged without the private key.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, import_or_raise
from foxnas_mlflow.flavor._seal import REGISTRATION

SIGNATURE = "foxnas.signature"
"""Tag of a logged model: the signature, a Sigstore bundle in JSON."""


def signer(private_key: Path) -> Callable[[Path], str]:
    """What signs the files of a model, or one file, with a key that is read now.

    Args:
        private_key: Elliptic curve key, PEM.

    Returns:
        Takes a directory or a file. Returns the signature: a Sigstore bundle in JSON, which the command
        ``model_signing verify key`` takes too.

    Raises:
        InvalidInputError: If the key cannot be read.
        MissingDependencyError: If the package model-signing is not installed.
    """
    signing = _module("signing")
    config = _with_key(lambda: signing.Config().use_elliptic_key_signer(private_key=private_key), private_key)

    def sign_files(files: Path) -> str:
        with tempfile.TemporaryDirectory() as directory:
            signature = Path(directory, "model.sig")
            config.set_hashing_config(_hashing(files)).sign(files, signature)
            return signature.read_text(encoding="utf-8")

    return sign_files


def check_signature(model: Path, signature: str, public_key: Path) -> None:
    """Verify the files of a model, or one file.

    Args:
        model: Directory of the model, or the file.
        signature: What `signer` returned.
        public_key: Elliptic curve key, PEM.

    Raises:
        InvalidFormatError: If another key signed them, or they are not the files that were signed.
        InvalidInputError: If the key cannot be read.
        MissingDependencyError: If the package model-signing is not installed.
    """
    verifying = _module("verifying")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.sig")
        path.write_text(signature, encoding="utf-8")
        config = _with_key(lambda: verifying.Config().use_elliptic_key_verifier(public_key=public_key), public_key)
        try:
            config.set_hashing_config(_hashing(model)).verify(model, path)
        except Exception as error:  # the package raises ValueError, cryptography's errors, and JSON's
            raise InvalidFormatError(
                f"{_what(model)} must be signed by the key {public_key.name}, with the content that it has",
                received=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                remedy="find out who signed it and what was changed; sign it again if it is right",
            ) from error


def check_signed(model: Path, model_id: str | None, public_key: Path) -> None:
    """Verify the files of a logged model with the signature that is kept with it.

    Args:
        model: Directory of the model.
        model_id: Id of the logged model, or None.
        public_key: Elliptic curve key, PEM.

    Raises:
        InvalidFormatError: If nobody signed it, another key did, or they are not the files that were signed.
        InvalidInputError: If the key cannot be read.
        MissingDependencyError: If the package model-signing is not installed.
    """
    signature = None if model_id is None else MlflowClient().get_logged_model(model_id).tags.get(SIGNATURE)
    if signature is None:
        raise InvalidFormatError("nobody signed it", remedy="run foxnas sign on this version")
    check_signature(model, signature, public_key)


def keep_signature(model_id: str, signature: str) -> None:
    """Keep a signature with its logged model."""
    MlflowClient().set_logged_model_tags(model_id, {SIGNATURE: signature})


def _what(path: Path) -> str:
    return path.name if path.is_file() else "a model"


def _module(name: str) -> Any:
    return import_or_raise(f"model_signing.{name}", extra="sign", feature="signing models")


def _hashing(model: Path) -> Any:
    config = _module("hashing").Config()
    return config.set_ignored_paths(paths=[model / REGISTRATION], ignore_git_paths=False)


def _with_key(configure: Callable[[], Any], key: Path) -> Any:
    try:
        return configure()
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(
            "a key must be a PEM file of an elliptic curve (prime256v1, secp384r1, secp521r1) without a password",
            received=f"{key}: {' '.join(str(error).split())[:120]}",
            remedy="make one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem, and its public part "
            "with: openssl ec -in key.pem -pubout -out key.pub",
        ) from error
