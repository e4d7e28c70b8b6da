from dataclasses import dataclass
from .topk import TopK
@dataclass(frozen=True)
class BatchTopK(TopK):
    pass
