"""Training: the loop and what a run keeps. It joins student, teacher, loss and stream; none of them knows it."""
