"""The data-free rule takes the tiles of least noise that the budget allows: no choice at all is better."""

from itertools import product

from hypothesis import example, given
from hypothesis import strategies as st

from tmpq_exp.search.tile_rule import choose_tiles

TILES = (0, 2, 4)
layers = st.lists(
    st.tuples(*[st.tuples(st.floats(1e-6, 10.0), st.integers(1, 10**11)) for _ in TILES]), min_size=1, max_size=4
)


@given(layers, st.floats(0, 1.1))
@example([((1.0, 1), (1.0, 1), (1.0, 8388606)), ((1.0, 1), (1.0, 1), (0.5, 2)), ((1.0, 3), (1.0, 3), (2.0, 1))], 1.2e-7)
@example([((2.5, 10**7), (0.5, 10**7 + 1), (3.5, 1)), ((2.0, 10**7 + 1), (2.5, 3), (3.0, 1))], 0.5)
def test_no_other_choice_has_less_noise_within_the_budget(
    found: list[tuple[tuple[float, int], ...]], at: float
) -> None:
    noise = [{tile: power for tile, (power, _) in zip(TILES, of_layer, strict=True)} for of_layer in found]
    bitops = [{tile: price for tile, (_, price) in zip(TILES, of_layer, strict=True)} for of_layer in found]
    lowest, highest = (sum(best(of_layer.values()) for of_layer in bitops) for best in (min, max))
    budget = lowest + int(at * (highest - lowest))

    def price(tiles: tuple[int, ...]) -> int:
        return sum(of_layer[tile] for of_layer, tile in zip(bitops, tiles, strict=True))

    def power(tiles: tuple[int, ...]) -> float:
        return sum(of_layer[tile] for of_layer, tile in zip(noise, tiles, strict=True))

    chosen = choose_tiles(noise, bitops, budget)
    assert chosen is not None
    assert price(chosen) <= budget
    least = min(power(tiles) for tiles in product(TILES, repeat=len(found)) if price(tiles) <= budget)
    assert power(chosen) <= least * (1 + 1e-6) + 1e-9
    assert choose_tiles(noise, bitops, lowest - 1) is None


def test_a_layer_with_one_tile_keeps_it() -> None:
    noise = [{0: 0.0}, {0: 1e-4, 2: 1e-3, 4: 1e-2}]
    bitops = [{0: 500}, {0: 900, 2: 500, 4: 300}]
    assert [choose_tiles(noise, bitops, budget) for budget in (1400, 1399, 999, 799)] == [(0, 0), (0, 2), (0, 4), None]
