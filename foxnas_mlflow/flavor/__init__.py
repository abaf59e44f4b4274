"""The MLflow flavor ``foxnas``: the products of the method as MLflow models.

Kinds: ``supernet``, ``predictors``, ``subnet``, ``tflite`` and ``edgetpu``. Every kind can be
loaded back natively (`load_model`) and as :py:mod:`mlflow.pyfunc`. A model is a directory of
safetensors, JSON and flatbuffer files and ``foxnas.json``, which names the kind, the format version
and the SHA-256 of every file; a file that was changed after logging is refused at load, and so is
one that was changed together with ``foxnas.json``: the registry has the checksum of that.

Importing this module imports MLflow, but neither torch nor tensorflow nor statsmodels: a kind
imports what it needs when it is loaded, and ``tflite`` needs NumPy, Pillow and a TFLite runtime.
"""

from foxnas_mlflow.flavor._files import KINDS, MODEL_FORMAT, Manifest, read_manifest
from foxnas_mlflow.flavor._mlflow import (
    FLAVOR_NAME,
    _load_pyfunc,
    get_default_conda_env,
    get_default_pip_requirements,
    image_signature,
    load_model,
    log_model,
    save_model,
)
from foxnas_mlflow.flavor._models import SubnetModel, SupernetModel, TfliteModel, main_file
from foxnas_mlflow.flavor._pyfunc import images_of
from foxnas_mlflow.flavor._seal import SEAL, check_seal, model_id_of, sealed
from foxnas_mlflow.flavor._signature import SIGNATURE, check_signature, check_signed, keep_signature, signer

__all__ = [
    "FLAVOR_NAME",
    "KINDS",
    "MODEL_FORMAT",
    "SEAL",
    "SIGNATURE",
    "Manifest",
    "SubnetModel",
    "SupernetModel",
    "TfliteModel",
    "_load_pyfunc",
    "check_seal",
    "check_signature",
    "check_signed",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "image_signature",
    "images_of",
    "keep_signature",
    "load_model",
    "log_model",
    "main_file",
    "model_id_of",
    "read_manifest",
    "save_model",
    "sealed",
    "signer",
]
