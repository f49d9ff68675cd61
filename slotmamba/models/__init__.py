"""The models and the layers that they are made of."""

from slotmamba.models.slotmamba import SlotMamba, SlotMambaForCausalLM, SlotMambaForSeq2Seq, build_model

__all__ = ["SlotMamba", "SlotMambaForCausalLM", "SlotMambaForSeq2Seq", "build_model"]
