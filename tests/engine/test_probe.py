from pathlib import Path
from support.distributed import run_ranks
from support.training import TinyConfig, train, losses
import pytest

def go(run_dir, strategy, micro):
    return train(TinyConfig(run_dir=run_dir, strategy=strategy, micro_batch=micro, trackers=[], max_norm=0.5))

@pytest.mark.parametrize("strategy,world,micro", [("single",1,0),("single",1,4),("ddp",2,0),("ddp",2,2),("fsdp",2,0),("fsdp",2,2),("hsdp",4,1)])
def test_x(tmp_path, strategy, world, micro):
    r = run_ranks(go, world, str(tmp_path/"a"), strategy, micro)
    l = losses(tmp_path/"a")
    print(strategy, micro, r[0]["engine"], r[0]["tensors"].keys(), [round(x,7) for x in l.values()][-3:])
