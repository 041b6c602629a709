"""The GPU report: `python -m benchmarks.gpu_report --out FOLDER`, a list of stages of processes with time limits.

It is made for a machine that is lent for minutes, without network: nothing is installed, every result is on disk as soon as it
exists, and a stage that fails, crashes or hangs loses only itself. `stages` lists what runs, `runner` starts and stops it,
`task` is the process of one task, and `tasks` holds what the tasks measure. Only `tasks` import torch.
"""
