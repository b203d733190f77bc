"""Words, sentences, questions and code lines from which `instruction_contexts` makes texts.

Braces are filled by `TextSource.fill`. Of every pool two thirds are for training and every third
entry is held out, so that no word, sentence or question frame is in both.
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
    "\"I never saw a {noun} like that,\" said {name}.",
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

# Sentences and questions in other languages.
FOREIGN: dict[str, tuple[str, ...]] = {
    "de": (
        "Der Bericht über {place} wurde {year} von {person} geschrieben.",
        "Die alte Brücke am Fluss ist seit {num} Jahren gesperrt.",
        "{name} fragte, ob die Firma {org} das Haus verkauft habe.",
        "Nach Angaben der Stadt kostet die neue Schule {num} Millionen Euro.",
        "Im Sommer fahren viele Familien mit dem Zug nach {place}.",
        "Der Mieter muss den Vertrag mit einer Frist von {num} Tagen kündigen.",
        "Das Museum zeigt Bilder, die lange als verloren galten.",
        "Eine Antwort auf diese Frage gibt der Text im dritten Absatz nicht.",
        "{person} arbeitet seit {year} als Ärztin in {place}.",
    ),
    "fr": (
        "Le rapport sur {place} a été publié en {year} par {person}.",
        "Le vieux pont au bord de la rivière est fermé depuis {num} ans.",
        "{name} a demandé si la société {org} avait vendu la maison.",
        "Selon la mairie, la nouvelle école coûtera {num} millions d'euros.",
        "En été, beaucoup de familles prennent le train pour {place}.",
        "Le locataire doit prévenir le propriétaire {num} jours avant son départ.",
        "Le musée présente des tableaux que l'on croyait perdus.",
        "La question reste ouverte et personne n'a donné de réponse.",
        "{person} travaille comme médecin à {place} depuis {year}.",
    ),
    "es": (
        "El informe sobre {place} fue publicado en {year} por {person}.",
        "El viejo puente junto al río está cerrado desde hace {num} años.",
        "{name} preguntó si la empresa {org} había vendido la casa.",
        "Según el ayuntamiento, la nueva escuela costará {num} millones de euros.",
        "En verano muchas familias viajan en tren a {place}.",
        "El inquilino debe avisar al dueño con {num} días de antelación.",
        "El museo muestra cuadros que se creían perdidos.",
        "La pregunta sigue abierta y nadie dio una respuesta.",
        "{person} trabaja como médica en {place} desde {year}.",
    ),
    "zh": (
        "{year}年，{org}公司在{place}开设了一家新工厂。",
        "河边的老桥已经关闭了{num}年。",
        "{name}问他的朋友为什么要卖掉那座房子。",
        "据市政府介绍，新学校将花费{num}万元。",
        "夏天，许多家庭坐火车去海边度假。",
        "承租人应当提前{num}天通知出租人。",
        "博物馆展出了一批失传已久的画。",
        "会议讨论了报告中的几个问题，但没有得出答案。",
        "{person}从{year}年起在医院工作。",
    ),
    "de_question": (
        "Wann wurde die alte Brücke gesperrt?",
        "Wer hat den Bericht über {place} geschrieben?",
        "Wie viel kostet die neue Schule?",
        "Warum hat {name} das Haus verkauft?",
        "In welcher Stadt arbeitet {person}?",
        "Was sagte {name} zu {org}?",
    ),
    "fr_question": (
        "Quand le vieux pont a-t-il été fermé ?",
        "Qui a écrit le rapport sur {place} ?",
        "Combien coûte la nouvelle école ?",
        "Pourquoi {name} a-t-il vendu la maison ?",
        "Dans quelle ville travaille {person} ?",
        "Qu'a dit {name} à propos de {org} ?",
    ),
    "es_question": (
        "¿Cuándo se cerró el viejo puente?",
        "¿Quién escribió el informe sobre {place}?",
        "¿Cuánto cuesta la nueva escuela?",
        "¿Por qué vendió {name} la casa?",
        "¿En qué ciudad trabaja {person}?",
        "¿Qué dijo {name} sobre {org}?",
    ),
    "zh_question": (
        "老桥是什么时候关闭的？",
        "谁写了关于{place}的报告？",
        "新学校要花多少钱？",
        "{name}为什么要卖房子？",
        "{person}在哪个城市工作？",
        "{org}公司什么时候成立的？",
    ),
}
