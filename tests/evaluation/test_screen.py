"""Screens: known effects are found, nothing is found where there is nothing, wells are the unit."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from scipy import stats
from sklearn.metrics import roc_auc_score

import phenoseq
from phenoseq.cli import main
from phenoseq.data.simulate import simulate_plate
from phenoseq.errors import DataError
from phenoseq.evaluation.exchange import Fit, retrieval
from phenoseq.evaluation.genesets import read_gene_sets
from phenoseq.evaluation.screen import Screen, screen
from phenoseq.evaluation.screen_page import write_screen_page
from phenoseq.evaluation.treatments import map_replicate
from phenoseq.evaluation.wells import hold_out, normalise_plates, usual_limit, well_profiles

GENES = 60


def plates(effects, seed, *, wells=2, controls=12, n_plates=2, cells=15, noise=0.3):
    """Cells of a screen: five programs of genes, effects of well and plate, treatments."""
    rng = np.random.default_rng(seed)
    programs = np.random.default_rng(99).standard_normal((5, GENES))
    values, obs = [], []
    for p in range(n_plates):
        plate = 0.5 * rng.standard_normal(GENES)
        for t, effect in enumerate([0.0, *effects]):
            shift = effect * np.random.default_rng(t).standard_normal(5)
            for w in range(controls if t == 0 else wells):
                mean = (shift + 0.1 * rng.standard_normal(5)) @ programs + plate
                state = rng.standard_normal((cells, 5)) @ programs
                values.append(mean + 0.5 * state + noise * rng.standard_normal((cells, GENES)))
                name = "DMSO" if t == 0 else f"drug{t}"
                obs += [(f"p{p}", f"{t}-{w}", name, 1.0)] * cells
    columns = ["Metadata_Plate", "Metadata_Well", "Metadata_Treatment", "ood_score"]
    table = pd.DataFrame(obs, columns=columns, index=[f"c{i}" for i in range(len(obs))])
    var = pd.DataFrame(
        {"symbol": [f"G{i}" for i in range(GENES)]}, [f"id{i}" for i in range(GENES)]
    )
    return ad.AnnData(np.concatenate(values).astype(np.float32), obs=table, var=var)


@pytest.mark.parametrize("normalise", ["none", "standardise", "sphere"])
def test_active_treatments_come_first(normalise):
    effects = [1.0] * 10 + [0.0] * 10
    result = screen(plates(effects, 0), control="DMSO", normalise=normalise, permutations=500)
    active = [int(name.removeprefix("drug")) <= 10 for name in result.ranking.index]
    rank = -np.arange(len(active))
    assert roc_auc_score(active, rank) >= 0.95
    assert result.ranking["activity"].iloc[0] > 5
    assert (result.ranking["q"][active] < 0.05).all()


def program_sets():
    """Return for each program of the simulated genes the dozen that follow it most."""
    programs = np.random.default_rng(99).standard_normal((5, GENES))
    rows = [(f"P{k}", f"G{g}", 1.0) for k in range(5) for g in np.argsort(-programs[k])[:12]]
    return pd.DataFrame(rows, columns=["source", "target", "weight"])


@pytest.mark.parametrize("normalise", ["none", "standardise", "sphere"])
@pytest.mark.parametrize(
    ("treatments", "screens", "design"),
    [
        (1, 60, {"wells": 4, "controls": 4, "n_plates": 1}),
        (1, 60, {"wells": 2, "controls": 3, "n_plates": 3}),
        (12, 15, {"wells": 2, "controls": 6, "n_plates": 2}),
        (12, 15, {"wells": 4, "controls": 8, "n_plates": 1, "noise": 5.0}),  # independent genes
    ],
)
def test_nothing_is_called_where_nothing_happens(normalise, treatments, screens, design):
    """Screens in which something is called are a twentieth, and p is uniform."""
    if normalise != "none":
        design = design | {"controls": 2 * design["controls"]}  # half are fitted on
    called, p = np.zeros(4), []
    for seed in range(screens):
        result = screen(
            plates([0.0] * treatments, seed, cells=4, **design),
            control="DMSO",
            normalise=normalise,
            permutations=300,
            gene_sets={"programs": program_sets()},
            replicates=True,
        )
        q = [result.ranking["q"], result.changes.layers["q"]]
        q += [result.changes.obsm["programs_q"].to_numpy(), result.ranking["map_q"]]
        called += [(x < 0.05).any() for x in q]
        p += result.ranking["p"].tolist()
    most = stats.binom.ppf(0.99, screens, 0.05)
    assert (called <= most).all(), called
    assert np.mean(p) > 0.5 - 2.5 * np.sqrt(1 / 12 / len(p)), np.mean(p)
    assert np.mean(np.array(p) <= 0.05) <= stats.binom.ppf(0.99, len(p), 0.05) / len(p)


def test_change_and_interval_against_students_t():
    """One plate, one treatment: the fit is the two-sample t-test of well means."""
    adata = plates([1.0], 3, wells=5, controls=6, n_plates=1)
    result = screen(adata, control="DMSO", permutations=100)
    wells = well_profiles(adata, "Metadata_Treatment")
    own = wells.obs["Metadata_Treatment"] == "drug1"
    test = stats.ttest_ind(wells.X[own], wells.X[~own])
    np.testing.assert_allclose(result.changes.layers["t"][0], test.statistic, rtol=1e-4)
    np.testing.assert_allclose(result.changes.layers["p"][0], test.pvalue, rtol=1e-3, atol=1e-12)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose(result.changes.layers["lower"][0], interval.low, rtol=1e-4)
    np.testing.assert_allclose(result.changes.layers["upper"][0], interval.high, rtol=1e-4)


def test_more_cells_of_a_well_are_no_more_wells():
    few, many = (
        screen(plates([0.5], 4, cells=c, wells=3), control="DMSO", permutations=50)
        for c in (10, 400)
    )
    assert few.changes.uns["screen"] == many.changes.uns["screen"]
    ratio = np.median(
        (many.changes.layers["upper"] - many.changes.layers["lower"])
        / (few.changes.layers["upper"] - few.changes.layers["lower"])
    )
    assert ratio > 0.3  # by cells it would be 0.16; the spread between wells stays


def test_files_of_any_size_give_the_same(tmp_path):
    adata = plates([1.0, 0.0], 5)
    path = tmp_path / "prediction.h5ad"
    adata.write_h5ad(path)
    ours, theirs = (screen(x, control="DMSO", permutations=50) for x in (adata, path))
    pd.testing.assert_frame_equal(ours.ranking, theirs.ranking)


@pytest.mark.parametrize("normalise", ["none", "standardise", "sphere"])
def test_strange_wells_are_set_apart(normalise):
    """They count nowhere: the screen is as it is without them."""
    adata = plates([1.0, 0.0], 6)
    strange = adata.obs["Metadata_Well"].isin(["0-0", "1-0"]).to_numpy()
    adata.obs.loc[strange, "ood_score"] = 9.0
    adata.X[strange] = 50.0
    how = {"control": "DMSO", "normalise": normalise, "permutations": 50, "replicates": True}
    result, without = screen(adata, **how), screen(adata[~strange].copy(), **how)
    apart = ["p0/0-0", "p0/1-0", "p1/0-0", "p1/1-0"]
    assert result.changes.uns["screen"]["wells_set_apart"] == apart
    assert result.wells.obs_names[result.wells.obs["set_apart"]].tolist() == apart
    pd.testing.assert_frame_equal(result.ranking, without.ranking)
    np.testing.assert_allclose(result.changes.X, without.changes.X)


def test_the_limit_follows_the_controls():
    usual = np.array([0.85, 0.9, 0.91, 0.92, 0.95])
    assert usual_limit(usual) == pytest.approx(1.5 * 0.91, abs=1e-3)  # they lie close: half more
    assert usual_limit(usual * 0.5 + [-0.3, -0.1, 0, 0.1, 0.3]) == pytest.approx(
        0.455 + 6 * 1.4826 * 0.105, abs=1e-3
    )
    assert usual_limit(2 * usual) == 2
    adata = plates([1.0, 0.0], 6)
    adata.obs["ood_score"] = 0.91
    swapped = (adata.obs["Metadata_Well"] == "1-0").to_numpy()
    adata.obs.loc[swapped, "ood_score"] = 1.74
    how = {"control": "DMSO", "permutations": 20}
    facts = screen(adata, **how).changes.uns["screen"]
    assert facts["wells_set_apart"] == ["p0/1-0", "p1/1-0"]
    assert facts["max_ood"] == pytest.approx(1.365)
    facts = screen(adata, max_ood=1.8, **how).changes.uns["screen"]
    assert (facts["wells_set_apart"], facts["max_ood"]) == ([], 1.8)


@pytest.mark.parametrize("n_plates", [1, 3])
def test_each_exchange_is_fitted_anew(n_plates):
    """Against least squares with the labels exchanged in the design itself."""
    adata = plates([1.0, 0.0, 0.5], 14, wells=3, n_plates=n_plates)
    wells = well_profiles(adata, "Metadata_Treatment")
    keep = wells.obs_names != "p0/2-1"  # not balanced
    label, plate = (
        wells.obs[c].to_numpy().astype(str)[keep] for c in ("Metadata_Treatment", "Metadata_Plate")
    )
    fit = Fit(wells.X[keep], label, plate, "DMSO")
    pool, drawn = fit.exchange(1, 5, np.random.default_rng(0))
    t = fit.exchanged(1, pool, drawn)
    np.testing.assert_allclose(t[0], fit.t[1])
    for row, treated in zip(t, drawn, strict=True):
        exchanged = label.copy()
        exchanged[pool] = np.where(treated, "drug2", "DMSO")
        anew = Fit(wells.X[keep], exchanged, plate, "DMSO")
        np.testing.assert_allclose(row, anew.t[1], rtol=1e-6)
        for one in np.unique(plate):
            assert treated[plate[pool] == one].sum() == (label[plate == one] == "drug2").sum()


def test_retrieval_is_that_of_copairs():
    pytest.importorskip("copairs")
    rng = np.random.default_rng(0)
    names = np.repeat(["a", "DMSO"], [5, 9])
    profiles = rng.normal(size=(14, 20)) + 0.5 * (names == "a")[:, None]
    found = retrieval(profiles, np.repeat("p", 14), (names == "a")[None])
    centred = profiles - profiles.mean(axis=0)
    obs = pd.DataFrame({"t": names})
    table = map_replicate(centred, obs, "t", control="DMSO", null_size=10)
    assert found[0] == pytest.approx(table.loc["a", "map"], abs=1e-5)


def test_plates_are_brought_onto_the_scale_of_their_controls():
    adata = plates([1.0], 7, controls=40, n_plates=2)
    wells = well_profiles(adata, "Metadata_Treatment")
    control = wells.obs["Metadata_Treatment"].to_numpy() == "DMSO"
    of_plate = wells.obs["Metadata_Plate"].to_numpy()
    fitted = hold_out(of_plate, control, np.random.default_rng(0))
    assert not (fitted & ~control).any()
    assert pd.Series(of_plate[fitted]).value_counts().to_dict() == {"p0": 20, "p1": 20}
    for how, unit in (("standardise", False), ("sphere", True)):
        values = normalise_plates(wells.X, of_plate, fitted, how)
        for plate in ("p0", "p1"):
            known = values[fitted & (of_plate == plate)]
            np.testing.assert_allclose(known.mean(axis=0), 0, atol=1e-9)
            assert known.std(axis=0, ddof=1).max() < 1.01
            if unit:
                off = np.cov(known.T) - np.diag(np.var(known.T, axis=1, ddof=1))
                assert np.abs(off).max() < 0.9
    with pytest.raises(DataError, match=r"plate p1: 0 control wells .* takes 6 or more"):
        hold_out(of_plate, control & (of_plate == "p0"), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.obs.drop(columns="Metadata_Well"), "no column 'Metadata_Well'"),
        (lambda a: a.obs.assign(Metadata_Treatment="drug1"), r"'DMSO'; .* has \['drug1'\]"),
        (lambda a: a.obs.assign(ood_score=np.nan), r"ood_score.* in 28 of 28 wells, e.g. p0/0-0"),
        (lambda a: a.obs.assign(Metadata_Plate=None), "some cells have no Metadata_Plate"),
        (lambda a: a.obs.assign(Metadata_Well="w"), "more than one Metadata_Treatment"),
    ],
)
def test_what_is_missing_is_said(change, said):
    adata = plates([1.0], 8)
    adata.obs = change(adata)
    with pytest.raises(DataError, match=said):
        screen(adata, control="DMSO")


def test_values_that_are_no_numbers_are_said():
    adata = plates([1.0], 8)
    adata.X[5, 3] = np.nan
    with pytest.raises(DataError, match=r"X has values .* in 1 of 28 wells, e.g. p0/0-0"):
        screen(adata, control="DMSO")


def test_a_treatment_of_one_well_is_told_and_not_scored():
    adata = plates([1.0, 1.0], 9, n_plates=1)
    lone = (adata.obs["Metadata_Well"] == "2-1").to_numpy()
    result = screen(adata[~lone].copy(), control="DMSO", permutations=50)
    assert list(result.ranking.index) == ["drug1"]
    assert result.changes.uns["screen"]["treatments_of_one_well"] == ["drug2"]


def test_gene_sets_move_with_their_genes(tmp_path):
    adata = plates([1.0, 0.0], 10)
    result = screen(adata, control="DMSO", permutations=20)
    order = np.argsort(result.changes.layers["t"][0])
    symbols = result.changes.var["symbol"].to_numpy()
    up, few = symbols[order[-12:]], symbols[:3]
    path = tmp_path / "sets.gmt"
    path.write_text(f"UP\tabout\t{chr(9).join(up)}\nFEW\tabout\t{chr(9).join(few)}\n")
    sets = {"sets": read_gene_sets(path)}
    changes = screen(adata, control="DMSO", gene_sets=sets).changes
    assert list(changes.obsm["sets"].columns) == ["UP"]
    slope = stats.linregress(np.isin(symbols, up).astype(float), changes.layers["t"][0])
    score = changes.obsm["sets"].loc["drug1", "UP"]
    np.testing.assert_allclose(score, slope.slope / slope.stderr, rtol=1e-3)
    assert changes.obsm["sets_q"].loc["drug1", "UP"] < 0.01
    with pytest.raises(DataError, match="_q marks q values"):
        screen(adata, control="DMSO", gene_sets={"a": sets["sets"], "a_q": sets["sets"]})
    other = pd.DataFrame({"source": "S", "target": [f"ENSG{i}" for i in range(9)], "weight": 1.0})
    with pytest.raises(DataError, match="no gene set has 5 of the 60"):
        screen(adata, control="DMSO", gene_sets={"other": other})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("absent.gmt", None, "no file of gene sets there"),
        ("folder.gmt", "", "no file of gene sets there"),
        ("empty.gmt", "UP\n", "no gene sets in it"),
        ("other.csv", "a,b\n1,2\n", "neither a .gmt nor a CSV"),
        ("text.csv", "source,target,weight\nA,G1,x\nA,G2,1\n", "1 weights .* 'x' of G1 in A"),
        ("none.csv", "source,target,weight\nA,G1,\nA,G2,1\n", "1 weights .* 'nan' of G1"),
    ],
)
def test_what_gene_sets_lack_is_said(tmp_path, name, text, said):
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_gene_sets(path)


def test_hallmark_and_progeny_files_are_read(shared_data):
    for name in ("h.all.v7.0.symbols.gmt", "progeny_human_top100.csv"):
        table = read_gene_sets(shared_data / "genesets" / name)
        assert table["source"].nunique() in (50, 14)


def test_command(tmp_path, capsys):
    plates([1.0, 0.0], 11, wells=3).write_h5ad(tmp_path / "p.h5ad")
    out = tmp_path / "out"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        program_sets().to_csv(tmp_path / folder / "genes.csv", index=False)
    one, two = (str(tmp_path / folder / "genes.csv") for folder in ("one", "two"))
    command = ["screen", str(tmp_path / "p.h5ad"), "--control", "DMSO", "-o", str(out)]
    more = ["--replicates", "--q", "0.2", "--permutations", "99", "--gene-sets", one]
    assert main([*command, *more]) == 0
    assert "drug1" in capsys.readouterr().out
    ranking = pd.read_csv(out / "ranking.csv", index_col="treatment")
    assert ranking.loc["drug1", "map"] > ranking.loc["drug2", "map"]
    assert ranking["p"].min() == 0.01
    assert ad.read_h5ad(out / "changes.h5ad").uns["screen"]["q_limit"] == 0.2
    assert "gene_id" in pd.read_csv(out / "genes.csv")
    assert "P0" in pd.read_csv(out / "gene_sets" / "genes.csv")
    assert {"screen.html", "changes.h5ad", "wells.h5ad"} <= {p.name for p in out.iterdir()}
    assert main([*command, "--gene-sets", one, two]) == 1
    assert "two files have one name" in capsys.readouterr().err
    assert main([*command, "--permutations", "0"]) == 1
    assert main(["screen", str(tmp_path / "no.h5ad"), *command[2:]]) == 1


@pytest.mark.slow
def test_simulated_plates_from_their_images():
    """Ten drugs that act and ten that do not, on two plates, predicted from the images alone."""
    names = [f"drug{i}" for i in range(20)]
    predicted = []
    for seed in (31, 32):
        plate = simulate_plate(
            seed=seed,
            treatments=("DMSO", *names),
            wells_per_treatment=4,
            sites_per_well=1,
            cells_per_site=15,
            inactive=names[10:],
        )
        predicted.append(phenoseq.predict(plate.source, model="simulated-plate", n_samples=4))
    adata = ad.concat(predicted)
    result = screen(adata, control="DMSO")
    active = [name in names[:10] for name in result.ranking.index]
    assert roc_auc_score(active, -np.arange(20)) >= 0.95
    false = result.ranking["q"][np.logical_not(active)] < 0.05
    assert false.sum() <= 1
    # where nothing acts: those that do nothing, and the controls
    nothing = adata[~adata.obs["Metadata_Treatment"].isin(names[:10])]
    null = screen(nothing.copy(), control="DMSO")
    assert (null.ranking["q"] < 0.05).sum() == 0
    assert (null.changes.layers["q"] < 0.05).sum() == 0


# ----------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A screen with all there is, of treatments whose names would break a careless page."""
    adata = plates([1.0, 0.0, 0.5], 12, wells=3)
    names = {"drug1": "</script><b>X", "drug2": "É$1"}
    adata.obs["Metadata_Treatment"] = adata.obs["Metadata_Treatment"].replace(names)
    lone = (adata.obs["Metadata_Well"] == "3-0").to_numpy()
    adata.obs.loc[lone, "ood_score"] = 9.0
    result = screen(adata, control="DMSO", permutations=200)
    shape = (3, 4)
    sets = [f"SET {i}" for i in range(4)]
    for name, values in (("hall", np.arange(12.0)), ("hall_q", np.linspace(0, 1, 12))):
        table = pd.DataFrame(values.reshape(shape), result.changes.obs_names, sets)
        result.changes.obsm[name] = table
    return result, result.save(tmp_path_factory.mktemp("screen") / "out") / "screen.html"


def test_the_page_is_one_file_that_asks_for_nothing(written):
    text = written[1].read_text()
    assert len(text.encode()) < 10_000_000
    own = text.replace(get_plotlyjs(), "")
    for outside in ("http://", "https://", 'src="//', "@import", "url("):
        assert outside not in own, outside
    assert "<b>X" not in own


def test_a_large_screen_makes_a_small_page(tmp_path):
    """2,500 treatments, 300 genes of long names: only what is most certain is in it."""
    n, g = 2500, 300
    rng = np.random.default_rng(0)
    made = screen(plates([1.0, 0.0], 13), control="DMSO", permutations=20)
    names = [f"compound {i}" for i in range(n)]
    obs = pd.concat([made.ranking.iloc[:1]] * n).set_axis(pd.Index(names, name="treatment"))
    changes = ad.AnnData(rng.normal(size=(n, g)), obs=obs, uns=made.changes.uns)
    changes.var_names = [f"ENSG{i:011d}" for i in range(g)]
    changes.layers.update({k: rng.normal(size=(n, g)) for k in ("lower", "upper", "p", "q")})
    changes.obsp["similarity"] = np.corrcoef(changes.X)
    wells = ad.concat([made.wells] * 200, index_unique="-")
    write_screen_page(tmp_path / "screen.html", Screen(changes, obs, wells))
    assert (tmp_path / "screen.html").stat().st_size < 10_000_000


@pytest.mark.long
def test_the_page_in_a_browser(written, browse):
    result, path = written

    async def steps(browser):
        assert await browser.run("document.title") == "Screen of Metadata_Treatment"
        names = (
            "[...document.querySelectorAll('#ranking-table tbody button')].map(b => b.textContent)"
        )
        assert await browser.run(names) == list(result.ranking.index)
        assert "Ordered by p" in await browser.run(
            "document.getElementById('criterion').textContent"
        )
        assert await browser.run("document.querySelectorAll('.plot .main-svg').length") >= 8
        # the search filters, and the choice of a treatment redraws its genes
        await browser.run("document.getElementById('search').focus()")
        await browser.call("Input.insertText", text="SCRIPT")
        assert await browser.run(names) == ["</script><b>X"]
        first = "document.querySelector('#gene-table tbody td').textContent"
        for i, name in enumerate(result.ranking.index):
            await browser.run(
                f"(() => {{ const c = document.getElementById('choice'); c.value = {i};"
                "c.dispatchEvent(new Event('change')); })()"
            )
            genes = result.genes()
            want = genes[genes["treatment"] == name].iloc[0]
            assert await browser.run(first) == want["symbol"]
            bar = "document.querySelector('#genes').data[0]"
            got = await browser.run(f"[{bar}.x.at(-1), {bar}.error_x.array.at(-1)]")
            np.testing.assert_allclose(
                got, [want["change"], want["upper"] - want["change"]], atol=2e-3
            )
        # by keyboard: past the table's frame to the button, which redraws
        await browser.run("document.getElementById('search').focus()")
        await browser.press("Tab", 9)
        await browser.press("Tab", 9)
        assert await browser.run("document.activeElement.textContent") == "</script><b>X"
        await browser.press("Enter", 13, text="\r")
        at = list(result.ranking.index).index("</script><b>X")
        await browser.until(f"document.getElementById('choice').value === '{at}'")
        # wells set apart stand by themselves
        rows = (
            "[...document.querySelectorAll('#well-table tbody tr')]"
            ".map(r => r.firstChild.textContent)"
        )
        assert await browser.run(rows) == ["p0/3-0", "p1/3-0"]
        bare = (
            "[...document.querySelectorAll('input, select, button, a, [role=img]')]"
            ".filter(x => !(x.textContent.trim() || x.ariaLabel || x.labels && x.labels.length))"
            ".length"
        )
        assert await browser.run(bare) == 0
        for width in (1280, 400):
            await browser.wide(width)
            await browser.until(
                "document.querySelector('#genes .main-svg').clientWidth < innerWidth"
            )
            assert await browser.run("document.documentElement.scrollWidth") <= width

    browse(path, steps)
