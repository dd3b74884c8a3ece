"""amid_ds distils large language models with the AMiD objective, at pretraining scale.

The paper is arXiv 2510.15982. Importing the package needs torch alone; deepspeed, transformers and
datasets are imported where they are used.
"""

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import AlphaBeta, AMiD, LMHead, amid_loss, linear_amid_loss, preset

__version__ = "0.1.0"
__all__ = ["AMiD", "AlphaBeta", "LMHead", "VocabShard", "amid_loss", "linear_amid_loss", "preset"]
