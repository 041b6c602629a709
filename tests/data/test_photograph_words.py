"""The list of nouns: every row says what it means, and everyday words are there."""

import pytest

from refsam.data.photographs.words import load_words, untaught_words

COCO = (
    "person bicycle car motorcycle airplane bus train truck boat|traffic light|fire hydrant|stop sign|parking meter|bench bird "
    "cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard|"
    "sports ball|kite|baseball bat|baseball glove|skateboard surfboard|tennis racket|bottle|wine glass|cup fork knife spoon "
    "bowl banana apple sandwich orange broccoli carrot|hot dog|pizza donut cake chair couch|potted plant|bed|dining table|"
    "toilet tv laptop mouse remote keyboard|cell phone|microwave oven toaster sink refrigerator book clock vase scissors|"
    "teddy bear|hair drier|toothbrush"
)
TWO_WORDS = {
    "traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "potted plant", "dining table", "cell phone", "teddy bear", "hair drier",
}  # fmt: skip


def coco_names() -> list[str]:
    return [n for part in COCO.split("|") for n in ([part] if part in TWO_WORDS else part.split())]


def test_all_nouns_of_coco_and_voc_mean_one_class() -> None:
    words = load_words()
    voc = "aeroplane diningtable motorbike pottedplant sofa tvmonitor".split()
    names = coco_names()
    assert len(names) == 80
    classes = {words.class_of(name) for name in names}
    assert len(classes) == 80 and classes <= set(words.classes)
    assert {words.class_of(name) for name in voc} <= classes


@pytest.mark.parametrize(
    ("word", "classes"),
    [
        ("woman", ("person",)), ("dancers", ("person",)), ("child", ("person",)), ("children", ("person",)),
        ("puppy", ("dog",)), ("swan", ("bird",)), ("duck", ("bird",)), ("bike", ("bicycle",)), ("taxi", ("car",)),
        ("van", ("car",)), ("couch", ("sofa",)), ("monitor", ("tv",)), ("cell phone", ("phone",)), ("mug", ("cup",)),
        ("ball", ("sports ball",)), ("jeans", ("trousers",)), ("glass", ("cup", "wine glass")), ("zorgs", ()),
    ],
)  # fmt: skip
def test_everyday_words_mean_their_class(word: str, classes: tuple[str, ...]) -> None:
    assert load_words().meaning(word) == classes


def test_groups_hold_their_classes_and_neighbours_share_one() -> None:
    words = load_words()
    assert {"dog", "cat", "bird"} <= set(words.meaning("animal"))
    assert {"car", "boat"} <= set(words.meaning("vehicles"))
    assert "dress" in words.meaning("clothes") and "apple" in words.meaning("fruit")
    assert "cat" in words.neighbours("dog") and "dog" not in words.neighbours("dog")
    assert words.neighbours("person") == ()


def test_every_row_can_be_spoken_of() -> None:
    words = load_words()
    assert len(words.vocabulary()) > 450
    for noun in words.nouns:
        assert noun.word == noun.word.lower() and noun.plural and noun.classes
        assert words.meaning(noun.word) == noun.classes
        assert noun in words.about(noun.classes[0])
    known = set(words.vocabulary())
    assert all(set(alike) <= known for alike in words.relatives().values())
    assert words.relatives()["puppy"][:2] == ("puppies", "dog")


def test_name_outside_the_list_is_its_own_noun() -> None:
    (noun,) = load_words().about("drone")
    assert (noun.word, noun.plural, noun.classes) == ("drone", "drones", ("drone",))


def test_untaught_words_are_those_of_no_taught_class() -> None:
    untaught = set(untaught_words(["dog", "cup", "dress"]))
    assert {"cat", "kitten", "backpack", "backpacks", "train", "lamp", "woman"} <= untaught
    assert not untaught & {"dog", "puppy", "puppies", "mug", "glass", "gown", "animal", "clothes"}
    # Words of shape and colour, and words for anything, stay.
    assert not untaught & {"orange", "ring", "donut", "object", "things", "red", "left"}
