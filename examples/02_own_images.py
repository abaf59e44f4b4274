"""From a folder of images to a served model.

    python examples/02_own_images.py [FOLDER [OPTIONS OF foxnas main]]

FOLDER has one folder a class with JPEG or PNG files. Without it 10 classes of handwritten digits are
written to a temporary folder. The pipeline trains, searches, quantizes, measures and promotes; then
the model is served, as `mlflow models serve` does it anywhere, and asked about one of the images.
"""

import base64
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


def write_digits(folder: Path) -> Path:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9375).astype("uint8")).save(folder / str(label) / f"{i}.png")
    return folder


def ask(url: str, image: Path) -> dict:
    columns = {"columns": ["image"], "data": [[base64.b64encode(image.read_bytes()).decode()]]}
    body = json.dumps({"dataframe_split": columns}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["predictions"][0]


with tempfile.TemporaryDirectory() as directory:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else write_digits(Path(directory, "digits"))
    done = subprocess.run([sys.executable, "-m", "foxnas_mlflow", "main", "--data", str(folder), *sys.argv[2:]])
    if done.returncode not in (0, 2):
        sys.exit(done.returncode)
    # Status 2 with a registered model: the gates refused it, and said why. It can be served all the same.
    model = "models:/foxnas-cpu@staging" if done.returncode == 0 else "models:/foxnas-cpu/latest"
    image = next(folder.rglob("*.png"), None) or next(folder.rglob("*.jp*g"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--port", str(port)]
    server = subprocess.Popen([*command, "--env-manager", "local"])
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"{model} cannot be served; see above")
                time.sleep(1)
        answer = ask(f"http://127.0.0.1:{port}/invocations", image)
        print(f"{model}: {image.parent.name}/{image.name} is {answer['label']} ({answer['probability']:.2f})")
    finally:
        server.terminate()
        server.wait()
