"""Words, sentences, questions and code from which `instruction_contexts` makes texts.

Braces are filled by `TextSource.fill`. Of every pool two thirds are for training and every third
entry is held out, so that no word, sentence or question frame is in both; what only training
styles use is for training alone.
"""

WORDS: dict[str, str] = {
    "noun": """
    river market engine garden letter bridge contract window kitchen battery valley permit forest
    signal invoice teacher harbour theory carpet budget village needle census orchestra pump ticket
    glacier pension mirror cluster tunnel recipe tariff lantern antenna vaccine ballot warehouse
    meadow fossil turbine passport sailor enzyme railway curtain lobby copper dialect furnace
    hospital treaty pigeon router auction cellar monsoon archive candle deposit saddle protein
    library merger comet refund bicycle quarry symphony clinic ladder subsidy basket reactor novel
    canal parcel wheat sensor tribunal museum cheese anchor mortgage beetle stadium filter compass
    charity violin drought pipeline jacket verdict lagoon coupon lecture barrel scanner parish
    magnet shipment orchard statute crater keyboard tenant festival alloy diary kernel fountain
    gallery cargo dentist ferry widget throne dividend nerve cottage satellite blanket motor
    committee sonata fertilizer wallet chapel resistor peninsula cabinet tractor poem gravel loan
    elevator cavern bakery stamp polymer mayor horizon fence drum cache planet helmet ledger
    oak bishop lens rumour salary dam tissue velvet moose index summary question report answer
    label paragraph story translation category example document title article text sentence
    meeting review function value number list key line query passage topic account schedule""",
    "adj": """
    old bright quiet northern annual broken digital narrow royal wooden public frozen medical
    hidden modern rapid ancient cheap formal solar rural steady hollow golden legal minor coastal
    gentle major empty foreign strict loose central daily urban fragile private dense internal
    curious useful severe recent famous local scarlet moderate double remote final short original
    following similar important relevant common whole main given final detailed brief""",
    "verb": """
    repaired sold opened measured painted moved delayed approved copied buried rented tested
    cancelled praised shipped ignored restored divided planted recorded lost borrowed inspected
    praised closed traded delivered rejected replaced filtered visited founded printed audited
    drained polished updated loaded sealed renamed described summarised answered counted listed
    translated found compared mentioned explained reviewed labelled completed""",
    "name": """
    Anna Boris Clara David Elena Farid Greta Hugo Irene Jonas Keiko Laila Marco Nadia Oscar Priya
    Quentin Rosa Samir Tessa Ulrich Vera Walter Ximena Yusuf Zoe Alice Bruno Carmen Dmitri Esther
    Felix Grace Hassan Ines Jacob Karin Liam Mei Noah Olga Pablo Ruth Stefan Tom Uma Victor Wendy
    John Mary Peter Susan Michael Linda Robert Sarah""",
    "surname": """
    Adler Brandt Castillo Dubois Eriksen Fischer Grant Haddad Ivanov Jensen Kovacs Larsen Moreau
    Nakamura Okafor Petrov Quinn Rossi Silva Tanaka Ueda Vargas Weber Xu Yilmaz Zeman Abbott
    Bennett Clarke Dawson Ellis Foster Gibson Harper Ingram Jordan Keller Lawson Mercer Nolan""",
    "place": """
    Lisbon Oslo Nairobi Lima Kyoto Dublin Quebec Hanoi Tunis Perth Malmo Quito Lagos Bergen Cairo
    Denver Basel Turin Seville Gdansk Bombay Havana Izmir Leipzig Accra Boston Riga Porto Austin
    Geneva Lyon Krakow Utrecht Dakar Bristol Sapporo Chile Norway Kenya Peru Canada Vietnam Egypt
    Portugal Brazil""",
    "org": """
    Norvik Halden Arcadia Bluestone Terranova Quantrel Meridian Oakfield Lumex Solara Pinecrest
    Vantor Helix Cobalt Eastgate Fairmont Greenway Ironbridge Kestrel Longview Monarch Nordlys
    Orchid Pallas Redwood Silverton Tamarind Umbra Westbrook Zephyr""",
    "topic": """
    taxes housing climate football shipping vaccines opera tourism wages fishing privacy rockets
    farming copyright earthquakes chess tariffs cycling elections cancer whales mining energy
    poetry immigration robots pensions water schools trade satellites music insurance coffee
    inflation roads bees electricity""",
    "month": """January February March April May June July August September October November
    December""",
    "language": "German French Spanish Chinese Italian Japanese English Polish Arabic Dutch Hindi",
}

SENTENCES = (
    "the {adj} {noun} near {place} was {verb} in {year}",
    "{person} {verb} the {noun} and the {noun} before {month}",
    "in {year}, {org} {verb} its {adj} {noun} in {place}",
    "nobody knows why the {noun} of the {noun} was {verb}.",
    "the committee asked whether the {noun} should be {verb}, and the answer was yes.",
    "according to {person}, the {adj} {noun} costs {num} euros.",
    "we {verb} {num} samples of {noun} with a {adj} {noun}.",
    '"I never saw a {noun} like that," said {name}.',
    "each {noun} has a {adj} {noun}, which is {verb} once a year.",
    "the report on {topic} was {verb} by {org} in {month} {year}.",
    "if the {noun} is {adj}, the tenant shall notify {org} within {num} days.",
    "{name} walked past the {noun} and looked at the {adj} {noun}.",
    "results for the {noun} improved by {num} percent over the {adj} baseline.",
    "the {noun} is located {num} km south of {place}.",
    "police in {place} are looking for a {adj} {noun} that was {verb} on {date}.",
    "a summary of the {noun} was {verb}, but the question of {topic} stayed open.",
    "please find the {adj} {noun} attached; {name} will bring the other copies.",
    "the patient was given {num} mg and felt {adj} after {num} hours.",
    "shares of {org} fell {num} percent after the {noun} was {verb}.",
    "there are {num} {noun}s in the {adj} {noun}, more than in {place}.",
    "born in {place} in {year}, {person} studied {topic} and later {verb} a {noun}.",
    "the first {noun} was {adj}, the second one {adj}.",
    "{org} shall not be liable for any {noun} that is {verb} without notice.",
    "what matters is not the {noun} but how it is {verb}.",
    "the title of the {noun} was {verb} by {surname} in the first paragraph.",
    "it rained in {place}, so the {noun} had to be {verb}.",
    "students read the passage, answer a question and write a short {noun}.",
    "this {noun} was last {verb} on {date} by user {name}.",
    "the minister for {topic}, {person}, {verb} the {noun} on {date}.",
    "many people who live in {place} think that {topic} will change everything.",
    "the {adj} {noun} has {num} rooms, a {noun} and a view of the {noun}.",
    "to install the {noun}, turn the {adj} {noun} until it clicks.",
    "errors in the {noun} are listed in table {num}.",
    "the court found that {surname} had {verb} the {noun}.",
    "our method compares each {noun} with the {adj} {noun} and keeps the best.",
    "the film follows {name}, a {adj} teacher who loses her {noun}.",
    "{name} and {name} talked about {topic} until the {noun} was {verb}.",
    "in the example above, the value of the {noun} is {num}.",
    "did the {noun} ever reach {place}? Historians disagree.",
    "the {noun} was translated into {language} and {verb} in {place}.",
    "for more than {num} years the {noun} has been {adj}.",
    "this section describes the {noun}, its {noun} and the {adj} {noun}.",
    "on {date} the {noun} reached {place} with {num} passengers.",
    "the word {noun} appears often in texts about {topic}.",
    "{org} hired {person} as head of {topic} and {verb} two {noun}s.",
    "the following {noun}s were {verb}: the {adj} {noun} and the {noun}.",
    "however, the {adj} {noun} could not be {verb} for lack of money.",
    "temperatures in {place} fell below {num} degrees in {month}.",
    "the code for the {noun} is kept in a {adj} {noun}.",
    "we need to complete the {noun} before the {noun} is {verb}.",
    "all but {num} of the {noun}s were {verb} at once.",
)

QUESTIONS = (
    "What did {person} say about the {noun}?",
    "Who {verb} the {adj} {noun}?",
    "In which year was the {noun} {verb}?",
    "Where is the {adj} {noun} located?",
    "Why was the {noun} {verb}?",
    "How much did {org} pay for the {noun}?",
    "What is the name of {person}'s {noun}?",
    "Which {noun} did {name} visit first?",
    "When did {person} move to {place}?",
    "How many {noun}s does {org} own?",
    "Is the {noun} older than the {noun}?",
    "What happened to the {noun} after {name} left {place}?",
    "Who is the {adj} {noun}'s owner?",
    "What kind of {noun} was {verb} in {place}?",
    "What is the capital of {place}?",
    "Which city did {surname} grow up in?",
    "Did {org} ever sell its {noun}?",
    "How long did the {noun} take?",
    "Who was {name} married to?",
    "What colour is the {noun}?",
    "How does {name} feel about {topic}?",
    "What was the main reason for the {adj} {noun}?",
    "At what time does the {noun} open?",
    "Whose {noun} was {verb}?",
    "Which of the two {noun}s was {verb} earlier?",
    "Are {person} and {person} of the same nationality?",
    "What does the {noun} cost?",
    "Where did {name} meet {name}?",
    "Which company {verb} the {noun} of {place}?",
    "How old was {person} when the {noun} was {verb}?",
    "What should I do if the {noun} is {adj}?",
    "Can I return the {noun} after {num} days?",
    "Who directed the film about the {noun}?",
    "What is the difference in price between the {noun} and the {noun}?",
    "What was {name}'s first job?",
    "Under what conditions may {org} end the agreement?",
    "What is the {noun} of {place} called?",
    "Who wrote the {noun} about {topic}?",
    "How many people work for {org}?",
    "What time did {name} leave?",
    "Where was {person} born?",
    "Which team won the {noun} in {year}?",
    "What is {person}'s phone number?",
    "Has the {noun} been {verb} yet?",
    "On what date does the {noun} end?",
    "Who else knew about the {noun}?",
    "To whom did {name} give the {noun}?",
    "What percentage of the {noun} was {verb}?",
    "By whom was the {noun} {verb}?",
    "How did {name} find the {noun}?",
    "For how many years was {surname} the head of {org}?",
    "What does {name} keep in the {noun}?",
    "Which {noun} is made in {place}?",
    "Does {name} like the {adj} {noun}?",
    "Why did {org} leave {place}?",
    "What was found under the {noun}?",
    "Which version of the {noun} is needed?",
    "From which country does the {noun} come?",
    "What is the email address of {org}?",
    "Who is responsible for the {noun}?",
    "When is the deadline for the {noun}?",
    "How high is the {noun} in {place}?",
    "What is the maximum {noun}?",
    "Which actor plays {name}?",
    "Was {person} ever in {place}?",
    "What did the {noun} look like?",
    "In what month was the {noun} {verb}?",
    "Who won the election in {place}?",
    "How fast is the {noun}?",
)

# Words of instructions, for training only: the held-out styles are written out in full. What both
# classes use alike (the first four) says nothing, so that the verbs and their objects must.
INSTRUCTION_WORDS: dict[str, tuple[str, ...]] = {
    "please": (
        "", "", "", "Please ", "Could you ", "Can you ", "I want you to ", "Your task is to ",
        "Now ", "Next, ", "You should ", "I need you to ", "Help me to ", "Would you please ",
        "Task: ", "First read everything, then ",
    ),
    "doc": (
        "text", "document", "article", "passage", "page", "file", "report", "transcript", "paper",
        "story", "letter", "conversation", "data", "material", "chapter", "notes", "passages",
        "documents", "context", "record",
    ),
    "src": (
        "", "", "in the {doc}", "from the {doc}", "of the {doc} above", "in the following {doc}",
        "from the {doc} below", "given here", "in this {doc}", "mentioned in the {doc}",
        "based on the {doc}", "using the {doc} above", "according to the {doc}",
    ),
    "form": (
        "", "", "", "", "briefly", "in one sentence", "in a few words", "as a list", "as JSON",
        "without explanation", "in English", "in at most {num} words", "and nothing else",
        "with the reason", "in detail", "step by step", "and be precise", "on one line",
    ),
    "out": ("", "", "", "Answer:", "Answer:", "Output:", "Response:", "Result:", "Reply:"),
    "locate": (
        "find", "find", "locate", "retrieve", "extract", "identify", "quote", "cite", "copy",
        "fetch", "get", "give", "give me", "state", "name", "return", "show", "show me",
        "indicate", "specify", "look up", "search for", "tell me", "point out", "look for",
        "write down", "determine",
    ),
    "target": (
        "name", "date", "exact sentence", "sentence", "line", "passage", "number", "value",
        "clause", "price", "address", "id", "code", "answer", "fact", "detail", "figure", "year",
        "word", "phrase", "place", "reason", "phone number", "amount", "section", "key", "entry",
        "password", "quotation", "evidence", "time", "owner", "author", "city", "company",
    ),
    "rework": (
        "summarise", "summarize", "summarize", "condense", "recap", "shorten", "abridge", "outline",
        "paraphrase", "rewrite", "rephrase", "reword", "translate", "convert", "transform",
        "reformat", "analyse", "analyze", "evaluate", "assess", "critique", "review", "discuss",
        "compare", "contrast", "classify", "categorize", "cluster", "sort", "proofread", "edit",
        "correct", "improve", "polish", "expand", "continue", "complete", "describe", "explain",
        "interpret", "restructure", "simplify", "clean up", "merge", "sum up",
    ),
    "write": ("write", "write", "create", "generate", "prepare", "draft", "make", "produce",
              "give me", "come up with", "design", "provide"),
    "product": (
        "a summary", "a short summary", "a concise summary", "an essay", "a report", "a letter",
        "a blog post", "an outline", "the minutes", "an abstract", "a review", "a poem",
        "a table of all {noun}s", "a timeline", "a translation", "a plan", "an email",
        "an article", "a headline", "a title", "slides", "a comparison", "unit tests",
        "documentation", "a quiz", "flashcards", "an FAQ", "a paraphrase", "an analysis",
        "a description", "a list of the main points", "bullet points", "a conclusion",
        "a classification", "keywords", "study questions", "a sequel", "a critique",
    ),
    "everything": (
        "all {noun}s", "every {noun}", "all names", "all dates", "all numbers", "all people",
        "all places", "each {noun}", "all questions", "all the facts", "every one of the {noun}s",
        "all decisions", "all arguments", "all characters", "all differences", "all similarities",
        "all errors", "the most important points", "the main topics", "the main events",
        "the most frequent words", "all of the tasks",
    ),
}  # fmt: skip

# Questions that only the whole text answers, for training.
WHOLE_QUESTIONS = (
    "What is {this|the} {doc} about?",
    "What {is|are} the main {idea|message|point|points|topics|arguments} of the {doc}?",
    "Which topics are covered {src}?",
    "What tone does the author use throughout?",
    "What patterns do you see across the {doc}?",
    "How has the {noun} changed over all these years?",
    "What can we conclude from all this?",
    "Which themes come up again and again?",
    "How many different {noun}s are {mentioned|there} {src}?",
    "How many {people|lines|paragraphs|words|entries} are there in total?",
    "How often is the {noun} mentioned {src}?",
    "How many times does {name} speak?",
    "What are the most {common|frequent} {words|names|errors|numbers}?",
    "Which {word|name|number} {appears|occurs} most {often|frequently}?",
    "How do the {doc} differ from each other?",
    "What do all {doc} have in common?",
    "What is the {average|total|sum|median} of the {noun}s?",
    "What is the overall {mood|sentiment|opinion|impression|structure}?",
    "What are the {advantages and disadvantages|strengths and weaknesses} overall?",
    "Do the {doc} contradict each other, and where?",
    "How does {name} change in the course of the story?",
    "What would be a good title?",
    "Which category does the {doc} belong to?",
    "Is the {doc} positive or negative on the whole?",
    "How would you improve this {doc}?",
    "What happens in the story, from start to end?",
)

# Blocks of code; {lb} and {rb} are braces.
PYTHON = (
    "def {verb}_{noun}({noun}, limit={num}):\n    \"\"\"Return the {adj} {noun}.\"\"\"\n"
    "    if not {noun}:\n        return None\n    return {noun}[:limit]",
    "class {surname}{org}:\n    def __init__(self, {noun}):\n        self.{noun} = {noun}\n"
    "        self.{adj} = {num}",
    "for {noun} in {noun}s:\n    if {noun}.{noun} > {num}:\n        print({noun}, \"{noun}\")\n"
    "    else:\n        total += {noun}.{noun}",
    "import {noun}\nfrom {noun}.{noun} import {surname}\n\nLIMIT = {num}",
    "    async def get_{noun}(self, key: str) -> int:\n        # {sentence}\n"
    "        {noun} = await self.{noun}.read(key)\n        return {noun}.{noun}",
    "try:\n    {noun} = load_{noun}(\"{noun}.txt\")\nexcept ValueError as error:\n"
    "    log.warning(\"bad {noun}: %s\", error)\n    raise",
    "    @property\n    def {noun}(self):\n        return self._{noun} * {num}\n",
    "def test_{noun}_is_{verb}():\n    {noun} = make_{noun}({num})\n"
    "    assert {noun}.{noun} == {num}",
    "with open(path) as file:\n    {noun} = [line.split(\",\") for line in file]",
)  # fmt: skip
BRACES = (
    "public int get{surname}(String {noun}) {lb}\n    if ({noun} == null) {lb}\n"
    "        return {num};\n    {rb}\n    return this.{noun}.size();\n{rb}",
    "function {verb}({noun}, {noun}) {lb}\n  const {noun} = {noun}.filter(x => x.{noun} > {num});\n"
    "  return {noun};\n{rb}",
    "static void {noun}_{verb}(struct {noun} *p, size_t n) {lb}\n"
    "    for (size_t i = 0; i < n; i++)\n        p[i].{noun} = {num};\n{rb}",
    "// {sentence}\nconst {noun} = require('./{noun}');\nlet {adj} = {num};",
    "private final Map<String, {surname}> {noun} = new HashMap<>();\n\n@Override\n"
    "public String toString() {lb} return \"{noun}\"; {rb}",
    "func (s *{surname}) {org}(id int) error {lb}\n\tif err := s.{noun}.Load(id); err != nil {lb}\n"
    "\t\treturn err\n\t{rb}\n\treturn nil\n{rb}",
    "#include <{noun}.h>\n\n/* {sentence} */\nint {noun}_{noun}(int {noun});\n",
    "using {org}.{surname};\n\nnamespace {org} {lb}\n    public class {surname} : I{surname} {lb}\n"
    "        public int {surname} {lb} get; set; {rb}\n    {rb}\n{rb}",
    "fn {verb}({noun}: &str) -> Option<u32> {lb}\n    let {noun} = {noun}.len();\n"
    "    Some({noun} as u32 + {num})\n{rb}",
)  # fmt: skip
