"""The models and the layers that they are made of."""

from slotmamba.models.slotmamba import SlotMambaForCausalLM, SlotMambaForSeq2Seq, build_model

__all__ = ["SlotMambaForCausalLM", "SlotMambaForSeq2Seq", "build_model"]
