"""The GPU report: `python -m benchmarks.gpu_report --out FOLDER`, a list of stages of processes with time limits.

It serves a machine that is available for minutes, without network: nothing is installed, every result is on disk as soon as it
exists, and a stage that fails, crashes or hangs loses only its own results.
`stages` lists the tasks, `runner` starts and stops them, `task` is the process of one, and `tasks` holds their measurements. Only
`tasks` import torch.
"""
