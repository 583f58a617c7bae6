"""``python -m dwf`` is ``dwf``."""

from dwf.cli import main

raise SystemExit(main())
