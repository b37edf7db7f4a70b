"""Threads that libraries keep: what must end so that those of a step do not get in each other's way."""

import ctypes
import logging

logger = logging.getLogger(__name__)

_SOFT = 1  # omp_pause_soft of OpenMP 5: what was set stays set


def release_threads() -> None:
    """End the OpenMP threads that wait for work of the calling thread; it gets new ones with its next parallel loop.

    Every thread that runs a parallel loop, torch's or ours, keeps a team of its own. Once teams have more threads
    than there are processors, GNU's runtime lets all of them sleep at each barrier where they would have spun for a
    moment: a decode step with hundreds of barriers takes twice as long, as long as the idle team exists. So a thread
    that has built a model, and an engine that has nothing to do, give theirs up.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all  # of the runtime that torch has loaded for everyone
    except (AttributeError, OSError, TypeError):  # none, or one before OpenMP 5: threads stay as they are
        logger.debug("the OpenMP runtime cannot end threads (omp_pause_resource_all is missing)")
        return
    pause(_SOFT)
