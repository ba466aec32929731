"""The parts of ``bench/scribble.py``: a hostile peer and its victims.

::

    scribble  --spawn-->  two pairs of processes that stream to each other   (victims)
       |
       +-- writes into the region they share, round by round a new one       (attacker)
           with what is where as PROTOCOL.md has it                          (layout)
"""
