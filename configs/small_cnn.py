"""A small robust network on 32×32 class folders, for comparing attacks: adversarial training in minutes on a CPU.

    python -m ibjax.main --config=configs/small_cnn.py --workdir=runs/small_cnn --config.data.path=FOLDER

17,000 weights, three epochs of FGSM from a uniform start (Wong et al., ICLR 2020) at eps 8/255, evaluated at 4/255.
`:smoke` shrinks it to seconds.
"""

from ibjax.config import base, parse_arg, smoke


def get_config(arg=None):
    _, small = parse_arg(arg)
    config = base()
    config.title = "small CNN"
    config.data = dict(name="folder", path="data/cifar10_jpeg", val_size=500, split_seed=0)
    config.model = dict(
        name="cnn", widths=((8, 8), (16, 16), (32, 32)), hidden=(), padding=1, batch_norm=True, pool="average"
    )
    config.objective = dict(name="pgd_at")
    config.attack = dict(name="fgsm", loss="ce", step_size="10/255", init="uniform")
    config.epochs = 3
    config.optimizer.lr = 0.05
    config.schedule = dict(name="cosine")
    config.evaluate.update(eps="4/255", batch_size=256, n=1000)
    if small:
        smoke(config, (32, 32, 3), 10, dict(widths=((4,), (4,))))
        config.evaluate.n = None
    return config
