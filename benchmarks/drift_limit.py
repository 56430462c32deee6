"""What does cache.drift read on text like the calibration's, and on other text? Its limit comes from the former.

    python benchmarks/drift_limit.py vq_kvcache/data/tiny-llama

As many tokens as there must be before a warning can come, of texts that the codec's calibration left out, of the
evaluation domains, and of text unlike any of it; the largest reading of all layers, at each budget.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from quality import DOMAINS
from tqdm import tqdm

from vq_kvcache import Codec
from vq_kvcache.drift import LIMIT, DriftSums
from vq_kvcache.hooks import own_caches
from vq_kvcache.spectral.calibration_text import encode
from vq_kvcache.spectral.sealing import packed_of

BITS = (1.0, 2.0, 3.0, 4.0)
EACH = 4  # texts of each kind
WINDOW, SINKS = 128, 4
TOKENS = 1248  # so that 1,024 are packed before the last of them come
# Marcel Proust, Du côté de chez Swann, 1913.
FRENCH = """Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient si
vite que je n'avais pas le temps de me dire: «Je m'endors.» Et, une demi-heure après, la pensée qu'il était temps de
chercher le sommeil m'éveillait; je voulais poser le volume que je croyais avoir encore dans les mains et souffler ma
lumière; je n'avais pas cessé en dormant de faire des réflexions sur ce que je venais de lire, mais ces réflexions
avaient pris un tour un peu particulier; il me semblait que j'étais moi-même ce dont parlait l'ouvrage: une église, un
quatuor, la rivalité de François Ier et de Charles-Quint. Cette croyance survivait pendant quelques secondes à mon
réveil; elle ne choquait pas ma raison mais pesait comme des écailles sur mes yeux et les empêchait de se rendre
compte que le bougeoir n'était plus allumé. Puis elle commençait à me devenir inintelligible, comme après la
métempsycose les pensées d'une existence antérieure; le sujet du livre se détachait de moi, j'étais libre de m'y
appliquer ou non; aussitôt je recouvrais la vue et j'étais bien étonné de trouver autour de moi une obscurité, douce
et reposante pour mes yeux, mais peut-être plus encore pour mon esprit, à qui elle apparaissait comme une chose sans
cause, incompréhensible, comme une chose vraiment obscure. Je me demandais quelle heure il pouvait être; j'entendais
le sifflement des trains qui, plus ou moins éloigné, comme le chant d'un oiseau dans une forêt, relevant les
distances, me décrivait l'étendue de la campagne déserte où le voyageur se hâte vers la station prochaine; et le petit
chemin qu'il suit va être gravé dans son souvenir par l'excitation qu'il doit à des lieux nouveaux, à des actes
inaccoutumés, à la causerie récente et aux adieux sous la lampe étrangère qui le suivent encore dans le silence de la
nuit, à la douceur prochaine du retour. J'appuyais tendrement mes joues contre les belles joues de l'oreiller qui,
pleines et fraîches, sont comme les joues de notre enfance. Je frottais une allumette pour regarder ma montre. Bientôt
minuit. C'est l'instant où le malade, qui a été obligé de partir en voyage et a dû coucher dans un hôtel inconnu,
réveillé par une crise, se réjouit en apercevant sous la porte une raie de jour. Quel bonheur, c'est déjà le matin!
Dans un moment les domestiques seront levés, il pourra sonner, on viendra lui porter secours. L'espérance d'être
soulagé lui donne du courage pour souffrir. Justement il a cru entendre des pas; les pas se rapprochent, puis
s'éloignent. Et la raie de jour qui était sous sa porte a disparu. C'est minuit; on vient d'éteindre le gaz; le
dernier domestique est parti et il faudra rester toute la nuit à souffrir sans remède. Je me rendormais, et parfois je
n'avais plus que de courts réveils d'un instant, le temps d'entendre les craquements organiques des boiseries,
d'ouvrir les yeux pour fixer le kaléidoscope de l'obscurité, de goûter grâce à une lueur momentanée de conscience le
sommeil où étaient plongés les meubles, la chambre, le tout dont je n'étais qu'une petite partie et à l'insensibilité
duquel je retournais vite m'unir."""


def unlike(tokenizer: Any) -> dict[str, list[int]]:
    """Name -> ids [TOKENS] of text that is none of the calibration's kinds."""
    generator = np.random.default_rng(0)
    texts = {"French": FRENCH, "numbers": " ".join(map(str, generator.integers(0, 10**6, TOKENS).tolist()))}
    found = {name: encode(tokenizer, text)[:TOKENS] for name, text in texts.items()}
    return found | {"random tokens": generator.integers(2, 8192, TOKENS).tolist()}


def alike(tokenizer: Any, codec: Codec) -> dict[str, list[list[int]]]:
    """Name -> ids of several texts: those that calibration left out, and the evaluation domains."""
    rows = {"held out": measure.held_out(tokenizer, codec, TOKENS, EACH)}
    for domain in DOMAINS:
        ids = encode(tokenizer, (measure.HERE / "text" / f"{domain}.txt").read_text("utf-8"))
        starts = np.linspace(0, len(ids) - TOKENS, EACH).astype(int).tolist()
        rows[domain] = [ids[s : s + TOKENS] for s in starts]
    return rows


def readings(model: Any, codec: Codec, ids: list[int], budgets: Sequence[float] = BITS) -> list[float]:
    """The largest energy of a layer at each budget, of the tokens that caches would have packed."""
    caches = own_caches(model)
    mx.eval(model(mx.array([ids]), cache=caches), [c.state for c in caches])
    last = SINKS + packed_of(len(ids), WINDOW, SINKS)
    found = []
    for bits in budgets:
        energies = []
        for layer, quantizers in codec.plan(bits).layers.items():
            sums = DriftSums()
            keys, values = (x[:, :, SINKS:last] for x in (caches[layer].keys, caches[layer].values))
            sums.watch(mx.zeros(1), keys, values, quantizers.keys, quantizers.values)
            energies.append(sums.read().energy)
        found.append(max(energies))
    return found


def main() -> None:
    """Write results/drift-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--codec", help="codec file; default: the stored or shipped one of the model")
    args = parser.parse_args()
    model, tokenizer, _, codec, identity = measure.load_with_codec(args.model, args.codec)
    texts = alike(tokenizer, codec) | {name: [ids] for name, ids in unlike(tokenizer).items()}
    found = {name: [readings(model, codec, ids) for ids in rows] for name, rows in tqdm(texts.items(), desc="texts")}
    name = pathlib.Path(args.model).name
    result = {"model": name, "codec_identity": identity, "tokens": TOKENS, "bits": BITS, "limit": LIMIT}
    measure.save(measure.RESULTS / f"drift-{name}.json", result | {"readings": found})
    print(json.dumps({name: [round(min(map(min, r)), 2), round(max(map(max, r)), 2)] for name, r in found.items()}))


if __name__ == "__main__":
    main()
