"""Batches for training on any number of hosts: every host reads its own rows of the same batches, with grain.

The numbers of the sentences are shuffled and put in batches before anything is read, in the same way on every host. So
the batches depend on the seed alone, and a position among them means the same on any number of hosts.

Axes: B sentences of the whole batch, b those of this host, T tokens.
"""

import grain
import numpy as np
import snippets

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [b, T], mask [b, T], labels [b]


def training_batches(
    split: snippets.Split, batch: int, epochs: int, seed: int, own: slice
) -> grain.DatasetIterator[Batch]:
    """This host's rows of every batch; its `get_state()` is the position among them, for `set_state`.

    An epoch's last sentences, too few for a batch, are left out of it; each epoch has an order of its own.

    Args:
        own: which rows are this host's, such as `lora.local_rows` says.
    """
    lengths = np.array([len(tokens) for tokens in split.tokens])

    def read(numbers: np.ndarray) -> Batch:
        mine = numbers[own]
        longest = int(lengths[numbers].max())  # of all rows: the arrays of all hosts have to have one shape
        return *snippets.pad([split.tokens[n] for n in mine], len(mine), longest), split.labels[mine]

    numbers = grain.MapDataset.range(len(split)).shuffle(seed=1000 * seed)  # grain adds the epoch
    numbers = numbers.batch(batch, drop_remainder=True).repeat(epochs)
    return iter(numbers.map(read).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
