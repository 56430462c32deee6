"""`python -m vq_kvcache` is the command `vq_kvcache`."""

from .cli import main

raise SystemExit(main())
