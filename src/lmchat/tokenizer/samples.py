"""Short texts of several kinds, for ``lmchat tokenizer eval``."""

from __future__ import annotations

ENGLISH = """\
The ferry left the harbour a little before six, while the lamps along the quay were still lit. Most of the passengers
had found seats below, out of the wind, but a schoolteacher and her two nephews stayed on deck to watch the town grow
small. She pointed out the customs house, the grain silo and the church whose bell had been cast from old cannon. The
boys wanted to know how a ship finds its way at night, so she told them about lighthouses, each with its own rhythm of
flashes, and about the charts on which those rhythms are written down. By the time the first stars came out, they were
counting seconds between the beams and guessing which headland each of them belonged to.
"""

CODE = '''\
from collections.abc import Iterator


def sliding_mean(values: list[float], width: int) -> Iterator[float]:
    """Yields the mean of every window of `width` neighbours."""
    if not 0 < width <= len(values):
        raise ValueError(f"width must be in 1..{len(values)}, got {width}")
    total = sum(values[:width])
    yield total / width
    for entering, leaving in zip(values[width:], values):
        total += entering - leaving
        yield total / width


if __name__ == "__main__":
    print([round(mean, 3) for mean in sliding_mean([1.0, 2.5, 4.0, 8.5, 16.0], width=2)])
'''

MATHS = r"""\
Let $f(x) = x^3 - 3x + 1$. Since $f(-2) = -1$, $f(0) = 1$, $f(1) = -1$ and $f(2) = 3$, the intermediate value theorem
gives three real roots. With $x = 2\cos\theta$ we have $f(x) = 2(4\cos^3\theta - 3\cos\theta) + 1 = 2\cos 3\theta + 1$,
so $\cos 3\theta = -\frac{1}{2}$ and the roots are $2\cos 40^\circ \approx 1.5321$, $2\cos 80^\circ \approx 0.3473$ and
$2\cos 160^\circ \approx -1.8794$. Check: $1.5321 + 0.3473 - 1.8794 = 0.0000$, and the product is $-1.0000$.
\[ \sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}, \qquad
   \int_0^1 x^2\,dx = \lim_{n\to\infty} \frac{1}{n^3}\sum_{k=1}^{n} k^2 = \frac{1}{3}. \]
"""

GERMAN = """\
Am Rand des Dorfes stand eine alte Mühle, deren Rad sich seit Jahren nicht mehr gedreht hatte. Eines Frühlings kaufte
sie eine Uhrmacherin aus der Stadt, ließ das Dach neu decken und den Bach vom Schilf befreien. Die Nachbarn schüttelten
zuerst die Köpfe, doch als das Wasser wieder über die Schaufeln lief und in der Stube ein großes Räderwerk zu ticken
begann, kamen sie einer nach dem anderen herüber, um zu sehen, wie der Fluss die Zeit anzeigte.
"""

KOREAN = """\
언덕 위의 작은 도서관은 비가 오는 날에 가장 붐빈다. 아이들은 창가에 앉아 그림책을 넘기고, 어른들은 따뜻한 차를 마시며
오래된 신문을 읽는다. 사서는 손님이 무엇을 찾는지 묻지 않아도 알 때가 많다. 비가 그치면 사람들은 책을 한 권씩 빌려 들고
천천히 언덕길을 내려간다.
"""

CONVERSATION = """\
Hi! Can you help me plan a vegetable garden? I only have a balcony, about 2 by 3 metres.
Of course! How many hours of sun does it get, and does anything shade it in the afternoon?
Roughly 6 hours, mostly in the morning. Nothing in the way except the railing.
That's enough for quite a lot. I'd start with:
1. Lettuce and radishes in shallow boxes (ready in 4–6 weeks)
2. One cherry tomato in a 20-litre pot, tied to the railing
3. Herbs such as chives, parsley and mint. Keep the mint in its own pot, or it'll take over!
Great, thanks! What does all that soil weigh? I'm a bit worried about the balcony 😅
Good question. Wet soil weighs about 1.5 kg per litre, so 100 litres come to 150 kg: fine for most balconies.
"""

SAMPLES = {
    "English": ENGLISH,
    "code": CODE,
    "maths": MATHS,
    "German": GERMAN,
    "Korean": KOREAN,
    "conversation": CONVERSATION,
}
