"""Import this before torch, so that threads wait as in fastsmart's commands (`fastsmart.machine.politeness`)."""

from fastsmart.machine import politeness

politeness.begin()
