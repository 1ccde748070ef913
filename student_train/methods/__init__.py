"""The table of methods, and how a recipe's options become one. A new method is its file and its line here."""

import json
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model

from store.shape import ModelShape
from store.strict import Strict, did_you_mean, explain
from student_train.methods.alp_kd import ALPKD
from student_train.methods.annealing_kd import AnnealingKD
from student_train.methods.att_kl import AttKL
from student_train.methods.att_mse import AttMSE
from student_train.methods.base import Method, TeacherShapes
from student_train.methods.ckd import CKD
from student_train.methods.cloze_kd import ClozeKD
from student_train.methods.cloze_loss import ClozeLoss
from student_train.methods.continuation_kd import ContinuationKD
from student_train.methods.contrast import Contrast
from student_train.methods.dgkd import DGKD
from student_train.methods.diito import DIITO
from student_train.methods.distilbert import DistilBERT
from student_train.methods.distillm import DistiLLM
from student_train.methods.distillm2 import DistiLLM2
from student_train.methods.fsp import FSP
from student_train.methods.gkd import GKD
from student_train.methods.hid_cls import HidCLS
from student_train.methods.hid_seq import HidSeq
from student_train.methods.hrkd import HRKD
from student_train.methods.kd import KD
from student_train.methods.lm_kd import LMKD
from student_train.methods.lm_loss import LMLoss
from student_train.methods.lrc_bert import LRCBERT
from student_train.methods.marginal_utility import MarginalUtility
from student_train.methods.match import Match
from student_train.methods.meta_kd import MetaKD
from student_train.methods.metadistil import MetaDistil
from student_train.methods.mgskd import MGSKD
from student_train.methods.minillm import MiniLLM
from student_train.methods.minilm import MiniLM
from student_train.methods.minilmv2 import MiniLMv2
from student_train.methods.mobilebert import MobileBERT
from student_train.methods.mt_bert import MTBERT
from student_train.methods.pkd import PKD
from student_train.methods.rail_kd import RAILKD
from student_train.methods.rkd import RKD
from student_train.methods.rl_kd import RLKD
from student_train.methods.rw_kd import RWKD
from student_train.methods.sentence import Sentence
from student_train.methods.sid import SID
from student_train.methods.task_loss import TaskLoss
from student_train.methods.theseus import Theseus
from student_train.methods.tinybert import TinyBERT
from student_train.methods.tmkd import TMKD
from student_train.methods.uncertainty import Uncertainty
from student_train.methods.universal_kd import UniversalKD
from student_train.methods.val_kl import ValKL

METHODS: dict[str, type[Method]] = {
    "task_loss": TaskLoss,
    "lm_loss": LMLoss,
    "kd": KD,
    "cloze_loss": ClozeLoss,
    "cloze_kd": ClozeKD,
    "annealing_kd": AnnealingKD,
    "continuation_kd": ContinuationKD,
    "lm_kd": LMKD,
    "gkd": GKD,
    "minillm": MiniLLM,
    "distillm": DistiLLM,
    "distillm2": DistiLLM2,
    "hid_cls": HidCLS,
    "hid_seq": HidSeq,
    "marginal_utility": MarginalUtility,
    "pkd": PKD,
    "alp_kd": ALPKD,
    "rail_kd": RAILKD,
    "universal_kd": UniversalKD,
    "att_mse": AttMSE,
    "att_kl": AttKL,
    "val_kl": ValKL,
    "minilm": MiniLM,
    "minilmv2": MiniLMv2,
    "tinybert": TinyBERT,
    "sid": SID,
    "mobilebert": MobileBERT,
    "distilbert": DistilBERT,
    "diito": DIITO,
    "sentence": Sentence,
    "rkd": RKD,
    "fsp": FSP,
    "lrc_bert": LRCBERT,
    "contrast": Contrast,
    "ckd": CKD,
    "mgskd": MGSKD,
    "rw_kd": RWKD,
    "meta_kd": MetaKD,
    "metadistil": MetaDistil,
    "hrkd": HRKD,
    "dgkd": DGKD,
    "uncertainty": Uncertainty,
    "rl_kd": RLKD,
    "tmkd": TMKD,
    "theseus": Theseus,
    "mt_bert": MTBERT,
    "match": Match,
}


def parse_method(name: str, options: dict[str, object], student: ModelShape, teacher: ModelShape | TeacherShapes | None) -> Method:
    """Build the method ``name`` for a student and its teacher; ``options`` are those of its ``__init__``, types and ranges checked.

    ``teacher`` is all of the phase's teachers by name where the method is for several of them.

    Raises:
        ValueError: unknown method or option (with the nearest known one), a value of another type or out of range, no
            teacher where one is needed, or two models that the method cannot compare.
    """
    cls = method_class(name)
    if cls.needs_teacher and teacher is None:
        alone = ", ".join(other for other, method in METHODS.items() if not method.needs_teacher)
        raise ValueError(f"method {name} learns from a teacher, but the phase has none; without one: {alone}")
    try:
        # As JSON, strict types still take a list for a tuple; YAML's other types (dates) become text and fail with a message.
        parsed = options_model(cls).model_validate_json(json.dumps(options, default=str), strict=True)
    except ValidationError as error:
        raise ValueError(explain(error, options_model(cls), f"method {name}")) from None
    arguments: dict[str, Any] = {option: getattr(parsed, option) for option in type(parsed).model_fields}
    build: Callable[..., Method] = cls
    try:
        return build(student, teacher, **arguments)
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from None


def method_class(name: str) -> type[Method]:
    """The method ``name``; raises ValueError with the nearest known one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, list(METHODS))}")
    return METHODS[name]


def options_model(cls: type[Method]) -> type[Strict]:
    """The keyword-only arguments of a method's ``__init__`` as a strict model."""
    hints = get_type_hints(cls.__init__, include_extras=True)
    options = [option for option in signature(cls).parameters.values() if option.kind is Parameter.KEYWORD_ONLY]
    fields: dict[str, Any] = {o.name: (hints[o.name], ... if o.default is Parameter.empty else o.default) for o in options}
    return create_model(cls.__name__, __base__=Strict, **fields)
