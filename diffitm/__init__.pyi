from diffitm.api import ImageTextScorer as ImageTextScorer
from diffitm.api import evaluate as evaluate
from diffitm.api import load_scorer as load_scorer
from diffitm.core.errors import InputError as InputError
from diffitm.core.schema import Example as Example
from diffitm.models.denoiser import Denoiser as Denoiser
from diffitm.scoring.scorer import Scorer as Scorer
from diffitm.tasks.base import Task as Task

__version__: str
__all__: list[str]
