"""Data that does not fit one product: minibatches, chunks, and hypergradients that are random.

`minibatches` and `given_batches` stand among the arguments in the place of data; `chunked` averages
over all rows, a few at a time. `stochastic_hypergradient`, `soba` and `saba` are explicit forms made of
batches; `certify_stochastic` tells their noise from their bias.
"""

from .batches import given_batches as given_batches
from .batches import minibatches as minibatches
from .chunks import chunked as chunked
from .sampling_error import StochasticCertificate as StochasticCertificate
from .sampling_error import certify_stochastic as certify_stochastic
from .single_loop import saba as saba
from .single_loop import soba as soba
from .stochastic_aid import stochastic_hypergradient as stochastic_hypergradient
