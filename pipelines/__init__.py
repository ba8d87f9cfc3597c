"""From data to a report: data -> federation -> run -> evaluate -> checkpoint -> report, and the command line.

`fedjax-core train` is `pipelines.train.train(Config(...), out)` with words; `Config` is everything that can change a
number. The modules, in the order data passes through them: `data`, `partition`, `methods`, `config`, `setup`, `train`
(with `checkpoint` and `history`), `report`, `cli`.
"""

from pipelines.config import Config

__all__ = ["Config"]
