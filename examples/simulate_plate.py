"""Write a store of a simulated plate, to train `simulated-plate` on.

python examples/simulate_plate.py simulated_plate.zarr
phenoseq train --config examples/simulated_plate.yaml
"""

from __future__ import annotations

import argparse

from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.data.storewriter import write_store

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("store", help="store to write")
parser.add_argument("--seed", type=int, default=1, help="of the plate (%(default)s)")
parser.add_argument("--wells", type=int, default=24, help="of each treatment (%(default)s)")
parser.add_argument("--sites", type=int, default=4, help="fields a well (%(default)s)")
parser.add_argument("--cells", type=int, default=24, help="cells a field (%(default)s)")
options = parser.parse_args()

plate = simulate_plate(
    seed=options.seed,
    wells_per_treatment=options.wells,
    sites_per_well=options.sites,
    cells_per_site=options.cells,
)
store = write_store(plate.source, options.store, pixel_size=PIXEL_SIZE, crop_px=64)
print(f"{store.path}: {len(store):,} cells, left out: {store.manifest.excluded}")
