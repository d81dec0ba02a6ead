"""Feed-forward blocks of any JAX function, found by dataflow, rewritten, and run in place.

`convert` is the door.  Where things are:

- `jaxprs`, `scopes`, `structural`, `views`: a traced function as steps on values, and which leaf
  of the parameters a value is a view of;
- `elements`, `symbols`, `dag`, `formulas`, `find`, `near`, `blocks`, `identity`: blocks found, and
  what they compute;
- `sites`, `settle`, `uses`: which blocks a function has, and who else uses their weights;
- `build`, `parts`, `partkeys`: all blocks as one graph, and the graph in parts again; `regions`,
  `surroundings`: the function around them as one, to look at;
- `storage`, `arrays`: where new parameters lie, and their values;
- `run`, `call`, `losses`: the function with its blocks replaced;
- `saving`, `loading`: a conversion as a folder.
"""

from __future__ import annotations

from moecc_backends.islands.conversion import Conversion as Conversion
from moecc_backends.islands.convert import convert as convert
from moecc_backends.islands.convert import graph as graph
from moecc_backends.islands.loading import load as load
