"""The ops of SlotMamba: each a folder with the definition, a vectorised form and one public function.

Where a form is hand-written, forward-mode derivatives (`torch.func.jvp`) raise an error.
"""

from slotmamba_kernels.bdlru import bdlru
from slotmamba_kernels.cross_entropy import linear_cross_entropy
from slotmamba_kernels.hksa import SlotState, hksa, hksa_step_
from slotmamba_kernels.kronecker import kronecker_topk
from slotmamba_kernels.ssd import ssd
from slotmamba_kernels.threading import SegmentEnds, hksa_threaded, thread_slots

__all__ = [
    "SegmentEnds",
    "SlotState",
    "bdlru",
    "hksa",
    "hksa_step_",
    "hksa_threaded",
    "kronecker_topk",
    "linear_cross_entropy",
    "ssd",
    "thread_slots",
]
