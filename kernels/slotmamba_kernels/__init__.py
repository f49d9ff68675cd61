"""The ops of SlotMamba: each a folder with the definition, a vectorised form and one public function."""

from slotmamba_kernels.bdlru import bdlru
from slotmamba_kernels.hksa import SlotState, hksa
from slotmamba_kernels.kronecker import kronecker_topk
from slotmamba_kernels.ssd import ssd
from slotmamba_kernels.threading import thread_slots

__all__ = ["SlotState", "bdlru", "hksa", "kronecker_topk", "ssd", "thread_slots"]
