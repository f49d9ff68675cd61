"""Threading the slot memory through the layers of a model (hksa.md, section 4)."""

from slotmamba_kernels.threading.mix import thread_slots
from slotmamba_kernels.threading.segments import SegmentEnds, hksa_threaded

__all__ = ["SegmentEnds", "hksa_threaded", "thread_slots"]
