"""``python -m foxnas_mlflow`` is the command ``foxnas``."""

from foxnas_mlflow.cli.main import main

raise SystemExit(main())
