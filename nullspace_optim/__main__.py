"""Entry point of ``python -m nullspace_optim``."""

from .cli import main

raise SystemExit(main())
