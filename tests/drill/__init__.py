"""The drill: a real run, killed, frozen, starved and poisoned, and compared with an undisturbed one."""
