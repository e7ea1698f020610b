import sys,time
sys.path[:0]=["/work/main","/work/main/tests"]
import pytest
def test_x(write_config,tmp_path,capfd):
    import train
    t=time.time()
    train.main([write_config(tmp_path)])
    print(time.time()-t)
    o,e=capfd.readouterr()
    print("OUT",o); print("ERR",e)
    import subprocess
    print(subprocess.run(f"cd {tmp_path}; find . | head -50; head -c 3000 run/metrics.jsonl; tail -1 run/rollouts.jsonl; cat run/summary.json; head -1 run/predictions.jsonl",shell=True,capture_output=True,text=True).stdout)
    assert 0
