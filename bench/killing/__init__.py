"""The parts of ``bench/kills.py``: processes with random sessions, some of which are killed.

::

    controller --fork--> workers (script: what each does, and when it is killed)
        |                   |
        |                   +-- threads or tasks: one end of a session each (ends, drivers)
        |                              |
        +---------- board -------------+   what each end has sent, how far each lane is,
                                           who was killed; it outlives whoever wrote it

An end judges its own stream: what it received is the stream that both ends know, it ends where the
peer says on the board that it ended it, and it breaks off only if the board says that the peer was
killed, or broke it off on purpose.
"""
