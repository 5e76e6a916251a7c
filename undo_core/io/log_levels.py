"""Silences torchao's warnings about GPU parts that it could not load; transformers imports torchao if it is installed."""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)
