"""What happens when something goes wrong in a run of several processes, and what they leave behind to find out why."""

from slotmamba.faults.logs import rank_log
from slotmamba.faults.recorder import keep_flight_record
from slotmamba.faults.watch import Limits, Watch, watched

__all__ = ["Limits", "Watch", "keep_flight_record", "rank_log", "watched"]
