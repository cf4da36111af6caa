"""`accel-tp-ddp`: what can be done without a run, on one machine and on the CPU.

`__main__` reads the command line, `frame` says what a command is and turns outcomes into exit codes; each other module
is one command.
"""
