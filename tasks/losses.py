"""Stage `losses`: how well the original model predicts each sample; built only when a selector asks for it."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from covercal.errors import ActivationError
from storage.manifest import Ref
from storage.tables import write_table
from tasks.cached import Build, cached
from tasks.capture import Shard
from tasks.identities import ModelIdentity
from tasks.model import original_decoder
from tasks.pool import sample_tokens

if TYPE_CHECKING:
    from covercal.quantization_settings import Dtype

LOSSES = "losses.parquet"


@cached("losses", version=1, ignored=("imported", "pool", "device"), names={"dtype": "model.dtype"})
def sample_losses(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    pool: Ref,
    shard: Shard,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Write the mean negative log-likelihood per token of every sample of a shard, in nats.

    Raises
    ------
    ActivationError
        When one is NaN or infinite; names the sample.
    """
    from covercal.evaluation import mean_losses

    decoder = original_decoder(build.store, model, imported, dtype, device)
    tokens = sample_tokens(build.store, pool)[shard.start : shard.stop]
    losses = mean_losses(decoder, tokens, advance=build.progress(len(tokens), "samples"))
    damaged = np.flatnonzero(~np.isfinite(losses))
    if damaged.size:
        raise ActivationError(
            f"The loss of sample {shard.start + damaged[0]} is NaN or infinite, and so are the model's outputs for it; "
            "a wider dtype (model.dtype: bfloat16 or float32) usually cures an overflow, not a damaged weight."
        )
    write_table(build.folder / LOSSES, {"loss": pa.array(losses)})
    return {"samples": len(tokens)}
