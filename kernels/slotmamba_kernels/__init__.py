"""The ops of SlotMamba: each a folder with the definition, a vectorised form and one public function."""

from slotmamba_kernels.hksa import SlotState, hksa
from slotmamba_kernels.kronecker import kronecker_topk

__all__ = ["SlotState", "hksa", "kronecker_topk"]
