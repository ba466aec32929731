"""The parts of ``bench/soak.py``: one listening process, and clients of several kinds.

::

    soak  --spawn-->  server    threads, one for each session   (servers)
      |               clients   one kind of load each           (clients)
      |
      +-- round by round: all clients work for a while, then nobody has a session, and
          everybody is weighed                                  (members)

Both ends know every stream and check each byte (streams).
"""
