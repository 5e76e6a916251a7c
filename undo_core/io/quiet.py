"""Keeps quiet what torchao, which transformers imports where it is installed, says of GPU parts that it could not load."""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)
