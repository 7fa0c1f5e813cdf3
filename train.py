"""Train a model: the command. `neox_native/train/main.py` tells the whole story.

    torchrun --standalone --nproc-per-node 2 train.py --config configs/quickstart.toml --parallel.tp 2

`python train.py --help` lists every setting. `python train.py --config FILE --dry-run` trains nothing: it says what each
rank of the config's mesh would need and send.
"""

if __name__ == "__main__":
    from neox_native.train.__main__ import command

    command()
else:
    from neox_native.train.main import main, train  # noqa: F401
