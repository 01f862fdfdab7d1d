"""My distributed KV cache, as far as it goes. The course writes each answer here once it passes.

Run it: python -m kvlab demo --impl work/mykv.py
"""

import bisect
import hashlib
import math
import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
