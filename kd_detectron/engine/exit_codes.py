"""Exit codes of the commands: what a cluster's scheduler may decide by."""

# A run failed for a reason that a restart alone does not mend: a loss that is not finite, a full
# disk, a corrupt image. What it had learnt until its last checkpoint is kept.
FAILED_EXIT_CODE = 1
# The user's mistake, said in one sentence; nothing was trained.
USER_ERROR_EXIT_CODE = 2
# EX_TEMPFAIL of sysexits.h: stopped by a signal with a checkpoint written; --resume goes on.
INTERRUPTED_EXIT_CODE = 75
