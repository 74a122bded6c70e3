"""Ctrl-C at a step of a run that is started from the command line."""

import os
import signal

import pytest
from lightning.pytorch import Callback


class Interrupt(Callback):
    """Sends Ctrl-C to this process in the middle of the step that is the last of ``left``, counted over the fits."""

    left = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Interrupt.left -= 1
        if Interrupt.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


INTERRUPT = "+callbacks.interrupt._target_=tests.support.interrupts.Interrupt"


@pytest.fixture
def uninterrupted():
    """Let no run be interrupted, until a test sets ``Interrupt.left``."""
    Interrupt.left = 0
