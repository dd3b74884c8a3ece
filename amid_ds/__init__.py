"""amid_ds distils large language models at pretraining scale with the AMiD objective (arXiv 2510.15982).

Importing it needs torch alone; deepspeed, transformers and datasets are imported where they are used.
"""

__version__ = "0.1.0"
